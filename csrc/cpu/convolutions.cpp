#include "convolutions.h"

#include "direct.h"
#include "winograd.h"

namespace fused_res {
namespace {

// The use of the residual; as in fused_res/ops/convolutions.py.
enum class Residual { none, add, concat, convolve };

// Reads a program number by number.
struct Reader {
  const std::vector<int64_t>& program;
  size_t at = 0;

  int64_t next() {
    STD_TORCH_CHECK(at < program.size(), "program ends early");
    return program[at++];
  }
  std::vector<int64_t> list(int64_t count) {
    STD_TORCH_CHECK(count >= 0, "a list in program must have at least 0 numbers");
    std::vector<int64_t> values(count);
    for (int64_t& value : values) value = next();
    return values;
  }
};

}  // namespace

Tensor convolutions_cpu(const Tensor& x, const OptTensor& residual,
                        const std::vector<Tensor>& weights, const std::vector<OptTensor>& biases,
                        const std::vector<int64_t>& program) {
  STD_TORCH_CHECK(weights.size() == biases.size() && !weights.empty(),
                  "weights must be at least one, with as many biases");
  Reader read{program};
  Tensor out = x;
  for (size_t i = 0; i < weights.size(); i++) {
    const int64_t tile = read.next(), out_channels = read.next(), act = read.next();
    const Residual role = (Residual)read.next();
    const std::vector<int64_t> sizes = read.list(read.next());
    STD_TORCH_CHECK(role == Residual::none || residual, "residual must be given");
    const bool inside = i + 1 < weights.size();
    const bool concat = role == Residual::concat;
    const OptTensor added = concat || role == Residual::add ? residual : OptTensor();
    if (tile) {
      out = winograd_cpu(out, weights[i], biases[i], added, out_channels, sizes, tile, concat, act,
                         inside);
    } else {
      std::vector<Tensor> inputs = {out};
      if (role == Residual::convolve) inputs.push_back(*residual);
      out = direct_cpu(inputs, weights[i], biases[i], added, out_channels, sizes, concat, act,
                       inside);
    }
  }
  STD_TORCH_CHECK(read.at == program.size(), "program is longer than its convolutions");
  return out;
}

}  // namespace fused_res
