// Runs CUDA kernels on a CPU, to prove them where there is no GPU: what csrc/cuda/platform.cuh is
// to nvcc. A block's threads are fibers that run, in an order shuffled by a seed, from one barrier
// to the next; so do the blocks of a grid. Shared memory is full of NaN before each block. Every
// access to global memory is checked against the allocations that were registered, and counted.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 128 << 10;
constexpr size_t kMaxShared = 48 << 10;  // of a block, without asking for more

struct Count {
  int64_t read = 0, written = 0;
};

struct Region {  // of global memory
  std::string name;
  const char *begin, *end;
  bool writable;
  Count count;  // of the running kernel
};

// Contexts start a fiber; from then on jumps switch, which leave the signal mask alone (a system
// call each way).
struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;
};

struct Machine {
  uint64_t random = 1;
  std::vector<Region> regions;
  size_t last_region = 0;
  std::map<std::pair<std::string, std::string>, Count> counts;  // by kernel and region
  std::string kernel, error;
  std::function<void()> body;
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  Fiber* running = nullptr;
  std::map<const void*, std::pair<char*, size_t>> shared;  // by declaration
  size_t shared_used = 0;
  alignas(16) char shared_memory[kMaxShared];

  uint64_t draw() {  // xorshift
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return random;
  }
  void shuffle(std::vector<int64_t>& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
  }
};

inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error(machine.kernel + ": " + what);
}

inline std::string address(const void* p) {
  char text[32];
  snprintf(text, sizeof text, "%p", p);
  return text;
}

inline Count& access(const void* p, size_t bytes, bool write) {
  const char* begin = (const char*)p;
  const auto holds = [&](const Region& r) { return r.begin <= begin && begin + bytes <= r.end; };
  const auto what = [&] { return std::string(write ? "store" : "load"); };
  if ((uintptr_t)p % bytes) fail("misaligned " + what() + " at " + address(p));
  auto& regions = machine.regions;
  if (machine.last_region >= regions.size() || !holds(regions[machine.last_region])) {
    const auto found = std::find_if(regions.begin(), regions.end(), holds);
    if (found == regions.end()) fail(what() + " out of bounds at " + address(p));
    machine.last_region = found - regions.begin();
  }
  Region& region = regions[machine.last_region];
  if (write && !region.writable) fail("store to the input " + region.name + " at " + address(p));
  return region.count;
}

inline void barrier() {  // back to the scheduler until it resumes this fiber
  if (_setjmp(machine.running->here) == 0) _longjmp(machine.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  machine.running = &fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void fiber_main() {
  for (;;) {
    try {
      machine.body();
    } catch (const std::exception& e) {  // must not leave this stack
      if (machine.error.empty()) machine.error = e.what();
    }
    machine.running->finished = true;
    barrier();
  }
}

inline void make_fibers(size_t n) {
  machine.fibers.resize(n);
  for (Fiber& f : machine.fibers) {
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    f.started = false;
    makecontext(&f.context, fiber_main, 0);
  }
}

inline std::vector<int64_t> numbers(int64_t n) {
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; i++) order[i] = i;
  return order;
}

inline void run_block(std::vector<int64_t>& order) {
  memset(machine.shared_memory, 0xff, kMaxShared);
  for (Fiber& f : machine.fibers) f.finished = false;
  for (size_t finished = 0; finished < order.size();) {
    machine.shuffle(order);
    finished = 0;
    for (const int64_t i : order) {
      threadIdx.x = i;
      resume(machine.fibers[i]);
      finished += machine.running->finished;
      if (!machine.error.empty()) return;
    }
    if (finished != 0 && finished != order.size()) {
      machine.error = machine.kernel + ": some threads of a block ended before a barrier of others";
      return;
    }
  }
}

// Runs a grid of one-dimensional blocks; throws std::runtime_error with what went wrong.
inline void launch(const char* name, dim3 grid, int threads, const std::function<void()>& body) {
  machine.kernel = name;
  machine.error.clear();
  machine.body = body;
  machine.shared.clear();
  machine.shared_used = 0;
  gridDim = grid, blockDim = dim3(threads);
  if (machine.fibers.size() != (size_t)threads) make_fibers(threads);
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) fail("no such grid");
  auto blocks = numbers((int64_t)grid.x * grid.y), order = numbers(threads);
  machine.shuffle(blocks);
  for (const int64_t b : blocks) {
    blockIdx.x = b % grid.x, blockIdx.y = b / grid.x;
    run_block(order);
    if (machine.error.empty()) continue;
    make_fibers(threads);  // some are in the middle of a kernel
    throw std::runtime_error(machine.error);
  }
  for (Region& r : machine.regions) {
    Count& total = machine.counts[{name, r.name}];
    total.read += r.count.read, total.written += r.count.written;
    r.count = {};
  }
}

template <class T>
struct Shared {
  T* data;
  int count;
  T& operator[](int i) const {
    if (i < 0 || i >= count) fail("shared memory index " + std::to_string(i) + " out of range");
    return data[i];
  }
};

template <class T>
inline Shared<T> shared(const void* declaration, int count) {
  auto& [data, bytes] = machine.shared[declaration];
  if (!data) {
    data = machine.shared_memory + machine.shared_used;
    bytes = count * sizeof(T);
    machine.shared_used += (bytes + 15) / 16 * 16;
    if (machine.shared_used > kMaxShared) fail("too much shared memory");
  }
  return {(T*)data, count};
}

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }

#define SHARED(type, name, count) \
  static char name##_declaration; \
  const auto name = emulator::shared<type>(&name##_declaration, count)

namespace fused_res::cuda {

struct Stream {};

template <class... Parameters, class... Arguments>
inline void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, Stream,
                   const Arguments&... arguments) {
  emulator::launch(name, grid, threads, [&] { kernel(arguments...); });
}

template <class V>
inline V load(const V* p) {
  emulator::access(p, sizeof(V), false).read += sizeof(V);
  return *p;
}
template <class V>
inline void store(V* p, V value) {
  emulator::access(p, sizeof(V), true).written += sizeof(V);
  *p = value;
}

template <class T>
inline float to_float(T v) {
  return load_element(&v);
}
template <class T>
inline void from_float(float v, T& out) {
  store_element(v, &out);
}

}  // namespace fused_res::cuda
