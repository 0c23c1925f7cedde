// The checks of every device's bn_act, before it does anything. bn_act() in Python repeats them in
// more words once a call has failed.
#pragma once
#include "bn_act.h"

namespace fused_res {

inline void check_act(int64_t act) {
  STD_TORCH_CHECK(0 <= act && act <= 2, "act must be 0, 1 or 2");
}

inline void check_channels(const char* prefix, const char* name, const OptTensor& t,
                           const Tensor& x) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1) && same_device(*t, x), prefix, name,
                  " must have shape (", x.size(1), ",) and be on x's device");
  const ScalarType dtype = x.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  STD_TORCH_CHECK(t->scalar_type() == dtype || (half && t->scalar_type() == ScalarType::Float),
                  prefix, name, " must have x's dtype, or be float32 with a 16-bit x");
}

inline void check_norm(const char* prefix, const BatchNorm& bn, const Tensor& x) {
  check_channels(prefix, "weight", bn.weight, x);
  check_channels(prefix, "bias", bn.bias, x);
  check_channels(prefix, "running_mean", bn.running_mean, x);
  check_channels(prefix, "running_var", bn.running_var, x);
  STD_TORCH_CHECK(bn.weight.has_value() == bn.bias.has_value(), prefix, "weight and ", prefix,
                  "bias must both be given or both be None");
  STD_TORCH_CHECK(bn.running_mean.has_value() == bn.running_var.has_value(), prefix,
                  "running_mean and ", prefix, "running_var must both be given or both be None");
  STD_TORCH_CHECK(bn.training || bn.running_mean, prefix, "running_mean must be given when ",
                  prefix, "training=False");
  STD_TORCH_CHECK(!bn.training || x.numel() > x.size(1),
                  "expected more than 1 value per channel when training");
  STD_TORCH_CHECK(!(bn.eps < 0 || (bn.training && bn.eps == 0)), prefix,
                  "eps must be positive during training, non-negative otherwise, got ", bn.eps);
}

inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  const auto a = t.sizes(), b = x.sizes();
  STD_TORCH_CHECK(std::equal(a.begin(), a.end(), b.begin(), b.end()) &&
                      t.scalar_type() == x.scalar_type() && same_device(t, x),
                  name, " must have x's shape, dtype and device");
}

inline void check_residual(const OptTensor& residual, bool residual_norm, const Tensor& x) {
  if (residual) check_like("residual", *residual, x);
  STD_TORCH_CHECK(residual || !residual_norm, "residual_norm needs a residual");
}

inline void check_sums(const OptTensor& sums, bool residual_norm, const Tensor& x) {
  STD_TORCH_CHECK(!sums || (sums->dim() == 2 && sums->size(0) == (residual_norm ? 4 : 2) &&
                            sums->size(1) == x.size(1) && sums->is_contiguous() &&
                            sums->scalar_type() == ScalarType::Double && same_device(*sums, x)),
                  "sums must be float64 of shape (2, C), or (4, C) with a residual_norm, "
                  "contiguous and on x's device");
}

}  // namespace fused_res
