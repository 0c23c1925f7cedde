// csrc/cuda's bn_act on CPU pointers, for tests/test_cuda_emulation.py.
#define FUSED_RES_EMULATION
#include "../../csrc/cuda/bn_act_kernels.cuh"

using namespace fused_res::cuda;

// what went wrong, or null
template <class Call>
static const char* run(uint64_t seed, const Call& call) {
  static std::string message;
  emulator::machine.random = seed * 2 + 1;
  for (auto& region : emulator::machine.regions) region.count = {};
  try {
    call();
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

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

void clear_regions() {
  emulator::machine.regions.clear();
  emulator::machine.counts.clear();
}

void add_region(const char* name, const void* p, int64_t bytes, bool writable) {
  emulator::machine.regions.push_back(
      {name, (const char*)p, (const char*)p + bytes, writable, emulator::Count{}});
}

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

const char* counts() {  // lines of: kernel region read written
  static std::string text;
  text.clear();
  for (const auto& [key, count] : emulator::machine.counts)
    text += key.first + " " + key.second + " " + std::to_string(count.read) + " " +
            std::to_string(count.written) + "\n";
  return text.c_str();
}

}  // extern "C"
