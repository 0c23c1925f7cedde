// csrc/cuda's bn_act on CPU pointers, for tests/bn_act/test_cuda_emulated.py.
#define FUSED_RES_EMULATION
#include "../../csrc/cuda/bn_act_backward.cuh"
#include "../../csrc/cuda/bn_act_forward.cuh"

#include "emulated.h"

using namespace fused_res::cuda;

extern "C" {

int64_t size_of_forward_args() { return sizeof(ForwardArgs); }
int64_t size_of_backward_args() { return sizeof(BackwardArgs); }
int64_t size_of_scratch(const Shape* shape, const Device* device) {
  return scratch_bytes(*shape, *device);
}

// first element, mask byte and length of an eight
void place_of(const Shape* shape, int64_t column, int64_t item, int64_t* out) {
  const Walk w = split_walk(*shape);
  const Place p = shape->channels_last ? Cursor<true, false>(w, column, item, 1).place()
                                       : Cursor<false, false>(w, column, item, 1).place();
  out[0] = p.element, out[1] = p.mask, out[2] = p.valid;
}

// the items [first, end) and the column of thread 0 of block b
void part_of(const Shape* shape, int64_t b, int64_t* out) {
  blockIdx = dim3((unsigned)b), threadIdx = dim3(0);
  const Walk w = split_walk(*shape);
  const Part p(w, false);
  out[0] = p.first, out[1] = p.end, out[2] = p.column, out[3] = w.blocks();
}

void set_most_together(unsigned blocks) { emulator::machine.most_together = blocks; }

const char* forward(const ForwardArgs* args, uint64_t seed) {
  return run(seed, [&] { bn_act_forward(*args, Stream{}); });
}

const char* backward(const BackwardArgs* args, uint64_t seed) {
  return run(seed, [&] { bn_act_backward(*args, Stream{}); });
}

const char* reapply(const ForwardArgs* args, uint64_t seed) {
  return run(seed, [&] { bn_act_reapply(*args, Stream{}); });
}

const char* statistics(const ForwardArgs* args, double* out, uint64_t seed) {
  return run(seed, [&] { bn_act_statistics(*args, out, Stream{}); });
}

}  // extern "C"
