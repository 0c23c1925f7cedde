// Runs CUDA kernels on a CPU, to prove them where there is no GPU: what csrc/cuda/platform.cuh is
// to nvcc. A block's threads are fibers that run, in an order shuffled by a seed, from one barrier
// to the next; so do the blocks of a grid, one after the other, or from one barrier of the grid to
// the next in a cooperative launch. Shared memory is full of NaN before each block. Every access to
// global memory is checked against the allocations that were registered, and counted.
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
constexpr size_t kMaxShared = 48 << 10;  // arrays of a block
constexpr size_t kMaxDynamic = 227 << 10;

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
  bool started = false;
};

// What a thread stops at, or all of a block's threads.
enum class Stop { block_barrier, grid_barrier, end };

struct Block {
  size_t first_fiber = 0;
  int64_t index = 0;
  std::unique_ptr<char[]> shared_memory;  // arrays, then the dynamic one
  Stop stop = Stop::block_barrier;
};

struct Machine {
  uint64_t random = 1;
  std::vector<Region> regions;
  size_t last_region = 0;
  std::map<std::pair<std::string, std::string>, Count> counts;  // by kernel and region
  std::string kernel, error;
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;  // that are on the device
  jmp_buf scheduler;
  Fiber* running = nullptr;
  Stop stop = Stop::end;                 // of the thread that ran last
  char* shared_memory = nullptr;         // of the running block
  std::map<const void*, size_t> shared;  // offsets, by declaration
  size_t shared_used = 0, dynamic_bytes = 0;
  unsigned most_together = ~0u;  // blocks of a cooperative launch

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

inline void stop(Stop at) {  // back to the scheduler until it resumes this fiber
  Fiber& fiber = *machine.running;
  machine.stop = at;
  if (_setjmp(fiber.here) == 0) _longjmp(machine.scheduler, 1);
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
    stop(Stop::end);
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

inline void start(Block& block, int64_t index) {
  if (!block.shared_memory) block.shared_memory.reset(new char[kMaxShared + kMaxDynamic]);
  memset(block.shared_memory.get(), 0xff, kMaxShared + machine.dynamic_bytes);
  block.index = index;
}

// to the next barrier of the grid, or the end
inline void run(Block& block, std::vector<int64_t>& order) {
  blockIdx.x = block.index % gridDim.x, blockIdx.y = block.index / gridDim.x;
  machine.shared_memory = block.shared_memory.get();
  do {
    machine.shuffle(order);
    for (size_t i = 0; i < order.size(); i++) {
      threadIdx.x = order[i];
      resume(machine.fibers[block.first_fiber + order[i]]);
      if (!machine.error.empty()) return;
      if (i > 0 && machine.stop != block.stop) {
        machine.error = machine.kernel + ": threads of a block do not meet at the same barrier";
        return;
      }
      block.stop = machine.stop;
    }
  } while (block.stop == Stop::block_barrier);
}

// Runs `blocks` of the grid as if alone on the device, from barrier to barrier.
inline void run_together(std::vector<int64_t> indices, int threads) {
  auto order = numbers(threads);
  std::vector<Block>& blocks = machine.blocks;
  if (blocks.size() < indices.size()) blocks.resize(indices.size());
  if (machine.fibers.size() < indices.size() * threads) make_fibers(indices.size() * threads);
  for (size_t i = 0; i < indices.size(); i++) {
    blocks[i].first_fiber = i * threads;
    start(blocks[i], indices[i]);
  }
  auto turns = numbers(indices.size());
  do {
    machine.shuffle(turns);
    for (const int64_t i : turns) {
      run(blocks[i], order);
      if (machine.error.empty() && blocks[i].stop != blocks[turns[0]].stop)
        machine.error = machine.kernel + ": blocks do not meet at the same barrier of the grid";
      if (machine.error.empty()) continue;
      make_fibers(machine.fibers.size());  // some are in the middle of a kernel
      throw std::runtime_error(machine.error);
    }
  } while (blocks[turns[0]].stop == Stop::grid_barrier);
}

// Runs a grid of one-dimensional blocks; throws std::runtime_error with what went wrong.
inline void launch(const char* name, dim3 grid, int threads, bool together, size_t dynamic_bytes,
                   const std::function<void()>& body) {
  machine.kernel = name;
  machine.error.clear();
  machine.body = body;
  machine.shared.clear();
  machine.shared_used = 0;
  machine.dynamic_bytes = dynamic_bytes;
  gridDim = grid, blockDim = dim3(threads);
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) fail("no such grid");
  if (dynamic_bytes > kMaxDynamic) fail("too much dynamic shared memory");
  auto blocks = numbers((int64_t)grid.x * grid.y);
  machine.shuffle(blocks);
  if (together)
    run_together(blocks, threads);
  else
    for (const int64_t b : blocks) {
      run_together({b}, threads);
      if (machine.blocks[0].stop == Stop::end) continue;
      make_fibers(machine.fibers.size());
      fail("a barrier of the grid in a launch that has none");
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
  const auto [found, fresh] = machine.shared.insert({declaration, machine.shared_used});
  if (fresh) machine.shared_used += (count * sizeof(T) + 15) / 16 * 16;
  if (machine.shared_used > kMaxShared) fail("too much shared memory");
  return {(T*)(machine.shared_memory + found->second), count};
}

template <class T>
inline Shared<T> dynamic_shared() {
  return {(T*)(machine.shared_memory + kMaxShared), (int)(machine.dynamic_bytes / sizeof(T))};
}

}  // namespace emulator

inline void __syncthreads() { emulator::stop(emulator::Stop::block_barrier); }

#define SHARED(type, name, count) \
  static char name##_declaration; \
  const auto name = emulator::shared<type>(&name##_declaration, count)
#define DYNAMIC_SHARED(type, name) const auto name = emulator::dynamic_shared<type>()

namespace fused_res::cuda {

struct Stream {};

template <class... Parameters, class... Arguments>
inline void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, Stream,
                   const Arguments&... arguments) {
  emulator::launch(name, grid, threads, false, 0, [&] { kernel(arguments...); });
}

template <class... Parameters>
inline bool launch_together(const char* name, void (*kernel)(Parameters...), unsigned blocks,
                            int threads, int shared_bytes, Stream, const Parameters&... arguments) {
  if (blocks > emulator::machine.most_together) return false;
  emulator::launch(name, blocks, threads, true, shared_bytes, [&] { kernel(arguments...); });
  return true;
}

inline void grid_barrier() { emulator::stop(emulator::Stop::grid_barrier); }

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
