// Runs CUDA kernels on a CPU, to prove them where there is no GPU: what csrc/cuda/platform.cuh is
// to nvcc. A block's threads are fibers that run, in an order shuffled by a seed, from one barrier
// to the next; where the lanes of a warp do something together, that warp goes on alone, from one
// such place to the next, so that warps are as far apart as barriers let them. So do the blocks of
// a grid, one after the other, or from one barrier of the grid to the next in a cooperative launch.
// Shared memory is full of NaN before each block. Every access to global memory is checked against
// the allocations that were registered, and counted. Every access to shared memory and to the
// allocations that are written is checked for races (races.h).
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
#include <optional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "races.h"
#include "requests.h"

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
constexpr size_t kLeastShared = 2;         // bytes of an access to shared memory
constexpr int64_t kMaxShadowed = 8 << 20;  // elements of an allocation whose accesses may race

struct Count {
  int64_t read = 0, written = 0;
};

struct Region {  // of global memory
  std::string name;
  const char *begin, *end;
  bool writable;
  Count count;  // of the running kernel
  std::optional<Shadow> shadow = {};
};

struct Copy {  // asynchronous, of 16 bytes to shared memory
  char *to, bytes[16];
  int group;
  const char* from;
  uint64_t writes;  // to what `from` is of, when it began
};

// Contexts start a fiber; from then on jumps switch, which leave the signal mask alone (a system
// call each way).
struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false;
  std::vector<Copy> copies;  // that have not arrived
  int groups = 0;            // of copies
  Moment moment;
  int64_t accesses = 0;  // since the last barrier
};

// What a thread stops at: something that all lanes of its warp do together, ...
enum class Stop { warp, block_barrier, grid_barrier, end };

// What the lanes of a warp do together, once each has left its part.
struct Warp {
  static constexpr int kLanes = 32;
  void (*work)(void* const* parts) = nullptr;
  void* parts[kLanes];
  int arrived = 0;
  bool only_waits = false;  // __syncwarp
};
struct Nothing {};

struct Block {
  size_t first_fiber = 0;
  int64_t index = 0;
  std::unique_ptr<char[]> shared_memory;  // arrays, then the dynamic one
  std::optional<Shadow> shadow;           // of it
  int remote = -1;  // barriers of the cluster before another block's last access
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
  std::vector<Warp> warps;    // of the running block
  jmp_buf scheduler;
  Fiber* running = nullptr;
  Stop stop = Stop::end;                 // of the thread that ran last
  char* shared_memory = nullptr;         // of the running block
  int rank = 0, together = 1;            // its number among those that run together
  std::map<const void*, size_t> shared;  // offsets, by declaration
  size_t shared_used = 0, dynamic_bytes = 0;
  unsigned most_together = ~0u;       // blocks of a cooperative launch
  uint32_t launches = 0, starts = 0;  // so far; of blocks that run together
  Requests requests;

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

inline void check_race(Shadow& shadow, const void* p, size_t bytes, Access access,
                       const Moment& now, const char* memory) {
  const char* other = shadow.check(p, bytes, access, now);
  if (other)
    fail("race: a " + std::string(access == Access::read ? "read" : "write") + " of " + memory +
         " at " + address(p) + " by thread " + std::to_string(threadIdx.x) + " of block " +
         std::to_string(blockIdx.x) + " with " + other);
}

inline Count& access(const void* p, size_t bytes, bool write, const std::source_location& where) {
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
  Fiber& thread = *machine.running;
  thread.accesses++;
  machine.requests.add(threadIdx.x, begin, bytes, false, write, where);
  if (region.shadow)
    check_race(*region.shadow, p, bytes, write ? Access::write : Access::read, thread.moment,
               region.name.c_str());
  return region.count;
}

inline void stop(Stop at) {  // back to the scheduler until it resumes this fiber
  Fiber& fiber = *machine.running;
  machine.stop = at;
  if (_setjmp(fiber.here) == 0) _longjmp(machine.scheduler, 1);
  if (at == Stop::block_barrier) fiber.moment.pass_block_barrier();
  if (at == Stop::grid_barrier) fiber.moment.pass_cluster_barrier();
  if (at != Stop::warp) fiber.accesses = 0;
}

inline void resume(Fiber& fiber) {
  machine.running = &fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline Moment first_moment() {
  Moment moment;
  moment.launch = machine.launches;
  moment.cluster = blockIdx.x + blockIdx.y * gridDim.x - machine.rank;
  moment.block = machine.rank;
  moment.warp = threadIdx.x / 32, moment.lane = threadIdx.x % 32;
  return moment;
}

inline void fiber_main() {
  for (;;) {
    machine.running->copies.clear();
    machine.running->groups = 0;
    machine.running->accesses = 0;
    machine.running->moment = first_moment();
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
  if (!block.shared_memory) {
    block.shared_memory.reset(new char[kMaxShared + kMaxDynamic]);
    block.shadow.emplace(block.shared_memory.get(), kMaxShared + kMaxDynamic, kLeastShared);
  }
  block.remote = -1;
  memset(block.shared_memory.get(), 0xff, kMaxShared + machine.dynamic_bytes);
  block.index = index;
}

// a thread, to what it stops at next
inline void advance(const Block& block, int64_t thread) {
  threadIdx.x = thread;
  resume(machine.fibers[block.first_fiber + thread]);
}

// What a warp does together needs its lanes at the same instruction: where some have come another
// way, for instance once more often round a loop, __syncwarp must bring them together before.
inline void check_together(const Block& block, int64_t warp) {
  const Fiber* lanes = &machine.fibers[block.first_fiber + warp * Warp::kLanes];
  if (machine.warps[warp].only_waits) return;
  for (int lane = 1; lane < Warp::kLanes; lane++)
    if (lanes[lane].accesses != lanes[0].accesses)
      machine.error = machine.kernel + ": lanes that went different ways do something together";
}

// a warp whose lanes have all arrived, to the next barrier of the block
inline void run_warp(const Block& block, int64_t index) {
  Warp& warp = machine.warps[index];
  auto lanes = numbers(Warp::kLanes);
  machine.shuffle(lanes);
  while (warp.arrived == Warp::kLanes) {
    check_together(block, index);
    if (!machine.error.empty()) return;
    warp.work(warp.parts);
    warp.arrived = 0;
    Stop first = Stop::end;
    for (const int64_t lane : lanes) {
      advance(block, index * Warp::kLanes + lane);
      if (lane == lanes[0]) first = machine.stop;
      if (machine.error.empty() && machine.stop != first)
        machine.error = machine.kernel + ": lanes of a warp do not stay together";
      if (!machine.error.empty()) return;
    }
  }
}

// to the next barrier of the grid, or the end
inline void run(Block& block, std::vector<int64_t>& order) {
  blockIdx.x = block.index % gridDim.x, blockIdx.y = block.index / gridDim.x;
  machine.shared_memory = block.shared_memory.get();
  do {
    machine.shuffle(order);
    machine.warps.assign(order.size() / Warp::kLanes + 1, {});
    block.stop = Stop::warp;
    for (const int64_t thread : order) {
      const int64_t warp = thread / Warp::kLanes;
      advance(block, thread);
      if (machine.stop == Stop::warp) {
        if (machine.warps[warp].arrived < Warp::kLanes) continue;
        run_warp(block, warp);
      }
      if (!machine.error.empty()) return;
      if (block.stop != Stop::warp && machine.stop != block.stop) {
        machine.error = machine.kernel + ": threads of a block do not meet at the same barrier";
        return;
      }
      block.stop = machine.stop;
    }
    for (const Warp& warp : machine.warps)
      if (warp.arrived) machine.error = machine.kernel + ": lanes of a warp do not stay together";
    machine.requests.flush(machine.kernel);
    if (!machine.error.empty()) return;
  } while (block.stop == Stop::block_barrier);
}

// Shared memory is gone when its block ends: other blocks' last accesses are before a barrier.
inline void check_end(const Block& block) {
  if (block.remote == machine.fibers[block.first_fiber].moment.cluster_barriers)
    fail("a block may have ended before another's access to its shared memory");
}

// Runs `blocks` of the grid as if alone on the device, from barrier to barrier.
inline void run_together(std::vector<int64_t> indices, int threads) {
  auto order = numbers(threads);
  std::vector<Block>& blocks = machine.blocks;
  if (blocks.size() < indices.size()) blocks.resize(indices.size());
  machine.together = (int)indices.size();
  machine.starts++;
  if (machine.fibers.size() < indices.size() * threads) make_fibers(indices.size() * threads);
  for (size_t i = 0; i < indices.size(); i++) {
    blocks[i].first_fiber = i * threads;
    start(blocks[i], indices[i]);
  }
  auto turns = numbers(indices.size());
  do {
    machine.shuffle(turns);
    for (const int64_t i : turns) {
      machine.rank = (int)i;
      run(blocks[i], order);
      if (machine.error.empty() && blocks[i].stop != blocks[turns[0]].stop)
        machine.error = machine.kernel + ": blocks do not meet at the same barrier of the grid";
      if (machine.error.empty()) continue;
      make_fibers(machine.fibers.size());  // some are in the middle of a kernel
      throw std::runtime_error(machine.error);
    }
  } while (blocks[turns[0]].stop == Stop::grid_barrier);
  for (size_t i = 0; i < indices.size(); i++) check_end(blocks[i]);
}

// Runs a grid of one-dimensional blocks; throws std::runtime_error with what went wrong.
// together: how many blocks at once; their barrier is the grid's, or a cluster's.
inline void launch(const char* name, dim3 grid, int threads, unsigned together,
                   size_t dynamic_bytes, const std::function<void()>& body) {
  machine.kernel = name;
  machine.launches++;
  machine.error.clear();
  machine.body = body;
  machine.shared.clear();
  machine.shared_used = 0;
  machine.dynamic_bytes = dynamic_bytes;
  gridDim = grid, blockDim = dim3(threads);
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) fail("no such grid");
  if (dynamic_bytes > kMaxDynamic) fail("too much dynamic shared memory");
  const int64_t blocks = (int64_t)grid.x * grid.y;
  if (blocks % together) fail("a grid that is no number of clusters");
  auto clusters = numbers(blocks / together);
  machine.shuffle(clusters);
  for (const int64_t cluster : clusters) {
    auto indices = numbers(together);
    for (int64_t& index : indices) index += cluster * together;
    run_together(indices, threads);
    if (together > 1 || machine.blocks[0].stop == Stop::end) continue;
    make_fibers(machine.fibers.size());
    fail("a barrier of the grid in a launch that has none");
  }
  for (Region& r : machine.regions) {
    Count& total = machine.counts[{name, r.name}];
    total.read += r.count.read, total.written += r.count.written;
    r.count = {};
  }
}

// An access to shared memory, which is of another block where `rank` is not the running block's.
// kMatrix: of a row that all lanes get a word of.
template <bool kMatrix = false>
inline void access_shared(const void* p, size_t bytes, Access access,
                          const std::source_location& where, int rank = machine.rank) {
  Fiber& thread = *machine.running;
  thread.accesses++;
  const int64_t offset = (const char*)p - machine.shared_memory;
  machine.requests.add(threadIdx.x, (const char*)offset, bytes, true, access != Access::read, where,
                       kMatrix);
  Block& block = machine.blocks[rank];
  Moment now = thread.moment;
  now.launch = machine.starts;  // each block has its own
  if (kMatrix) now.lane = Moment::kMany;
  if (rank != machine.rank) {
    if (now.cluster_barriers == 0) fail("another block's shared memory before it may have started");
    block.remote = now.cluster_barriers;
  }
  check_race(*block.shadow, block.shared_memory.get() + offset, bytes, access, now,
             "shared memory");
}

// A copy of the running thread to its shared memory has arrived: until now it may have been read.
inline void arrive(const Copy& copy) {
  Moment now = machine.running->moment;
  Region& region = *std::find_if(machine.regions.begin(), machine.regions.end(), [&](Region& r) {
    return r.begin <= copy.from && copy.from + 16 <= r.end;
  });
  if (region.shadow) {
    if (region.shadow->written_since(copy.writes, copy.from, 16))
      fail("race: a write of " + region.name + " at " + address(copy.from) +
           " before a copy of it was waited for");
    check_race(*region.shadow, copy.from, 16, Access::read, now, region.name.c_str());
  }
  now.launch = machine.starts;
  machine.blocks[machine.rank].shadow->arrive(copy.to, 16, now);
}

// An element of an array, read or written.
template <class T>
struct Element {
  T* p;
  std::source_location where;
  operator T() const {
    access_shared(p, sizeof(T), Access::read, where);
    return *p;
  }
  void operator=(T value) const {
    access_shared(p, sizeof(T), Access::write, where);
    *p = value;
  }
  T* operator&() const { return p; }
};

struct Index {
  int i;
  std::source_location where;
  Index(int i, std::source_location where = std::source_location::current()) : i(i), where(where) {}
};

template <class T>
struct Shared {
  T* data;
  int count;
  Element<T> operator[](Index index) const {
    const int i = index.i;
    if (i < 0 || i >= count) fail("shared memory index " + std::to_string(i) + " out of range");
    return {data + i, index.where};
  }
};

template <class T>
inline Shared<T> shared(const void* declaration, int count) {
  const auto [found, fresh] = machine.shared.insert({declaration, machine.shared_used});
  if (fresh) machine.shared_used += (count * sizeof(T) + 15) / 16 * 16;
  if (machine.shared_used > kMaxShared) fail("too much shared memory");
  return {(T*)(machine.shared_memory + found->second), count};
}

// Leaves the lane's part of what its warp does together, and goes on when that is done.
template <class Part, void (*kWork)(Part* const* parts)>
inline void together(Part part) {
  Warp& warp = machine.warps[threadIdx.x / Warp::kLanes];
  const auto work = +[](void* const* parts) { kWork((Part* const*)parts); };
  if (warp.arrived && warp.work != work) fail("lanes of a warp do different things");
  warp.work = work;
  warp.only_waits = std::is_same_v<Part, Nothing>;
  warp.parts[threadIdx.x % Warp::kLanes] = &part;
  warp.arrived++;
  stop(Stop::warp);
}

inline void do_nothing(Nothing* const*) {}

// bounds of an access to the dynamic shared memory
inline void check_shared(const char* p, size_t bytes) {
  const char* begin = machine.shared_memory + kMaxShared;
  if ((uintptr_t)p % bytes) fail("misaligned access to shared memory");
  if (p < begin || p + bytes > begin + machine.dynamic_bytes)
    fail("access to shared memory out of bounds, at " + std::to_string(p - begin));
}

template <class T>
inline Shared<T> dynamic_shared() {
  return {(T*)(machine.shared_memory + kMaxShared), (int)(machine.dynamic_bytes / sizeof(T))};
}

}  // namespace emulator

inline void __syncthreads() { emulator::stop(emulator::Stop::block_barrier); }
inline void __syncwarp() {
  emulator::together<emulator::Nothing, emulator::do_nothing>({});
  emulator::machine.running->moment.pass_warp_barrier();
  emulator::machine.running->accesses = 0;
}

#define SHARED(type, name, count) \
  static char name##_declaration; \
  const auto name = emulator::shared<type>(&name##_declaration, count)
#define DYNAMIC_SHARED(type, name) const auto name = emulator::dynamic_shared<type>()

#ifndef FUSED_RES_EMULATED_RUNTIME  // whose launches are those of platform.cuh
namespace fused_res::cuda {

struct Stream {};

template <class... Parameters, class... Arguments>
inline void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, Stream,
                   const Arguments&... arguments) {
  emulator::launch(name, grid, threads, 1, 0, [&] { kernel(arguments...); });
}

template <class... Parameters>
inline void launch_clusters(const char* name, void (*kernel)(Parameters...), unsigned blocks,
                            int cluster, int threads, int shared_bytes, Stream,
                            const Parameters&... arguments) {
  emulator::launch(name, blocks, threads, cluster, shared_bytes, [&] { kernel(arguments...); });
}

template <class... Parameters>
inline bool launch_together(const char* name, void (*kernel)(Parameters...), unsigned blocks,
                            int threads, int shared_bytes, Stream, const Parameters&... arguments) {
  if (blocks > emulator::machine.most_together) return false;
  emulator::launch(name, blocks, threads, blocks, shared_bytes, [&] { kernel(arguments...); });
  return true;
}

}  // namespace fused_res::cuda
#endif

namespace fused_res::cuda {

inline void grid_barrier() { emulator::stop(emulator::Stop::grid_barrier); }

// Where in the source: of the caller.
using Where = std::source_location;

template <class V>
inline V load(const V* p, Where where = Where::current()) {
  emulator::access(p, sizeof(V), false, where).read += sizeof(V);
  return *p;
}
template <class V>
inline void store(V* p, V value, Where where = Where::current()) {
  emulator::access(p, sizeof(V), true, where).written += sizeof(V);
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

// --- what csrc/cuda/mma.cuh says of these; layouts as the PTX ISA gives them

template <class V>
inline V load_shared(const char* p, Where where = Where::current()) {
  emulator::check_shared(p, sizeof(V));
  emulator::access_shared(p, sizeof(V), emulator::Access::read, where);
  return *(const V*)p;
}
template <class V>
inline void store_shared(char* p, V value, Where where = Where::current()) {
  emulator::check_shared(p, sizeof(V));
  emulator::access_shared(p, sizeof(V), emulator::Access::write, where);
  *(V*)p = value;
}

constexpr bool kHasMma = true, kHasClusters = true;

inline int cluster_rank() { return emulator::machine.rank; }
template <class V>
inline void store_shared_of(int rank, char* p, V value, Where where = Where::current()) {
  emulator::check_shared(p, sizeof(V));
  auto& blocks = emulator::machine.blocks;
  if (rank < 0 || rank >= emulator::machine.together) emulator::fail("no such block of a cluster");
  emulator::access_shared(p, sizeof(V), emulator::Access::write, where, rank);
  char* there = blocks[rank].shared_memory.get() + (p - emulator::machine.shared_memory);
  *(V*)there = value;
}
inline void cluster_barrier() {
  __syncwarp();
  emulator::stop(emulator::Stop::grid_barrier);
}

struct MatrixRow {
  const char* row;
  uint32_t* words;
};
inline void load_rows(MatrixRow* const* lanes) {
  for (int matrix = 0; matrix < 4; matrix++) {
    MatrixRow* const* rows = lanes + 8 * matrix;
    for (int lane = 0; lane < 32; lane++)
      memcpy(&lanes[lane]->words[matrix], rows[lane / 4]->row + lane % 4 * 4, 4);
  }
}
inline void load_matrices(const char* row, uint32_t (&words)[4], Where where = Where::current()) {
  emulator::check_shared(row, 16);
  emulator::access_shared<true>(row, 16, emulator::Access::read, where);
  emulator::together<MatrixRow, load_rows>({row, words});
}

// From its start to the end of the wait for it a copy's destination is full of NaN.
inline void start_copy(char* shared, const char* global, Where where = Where::current()) {
  emulator::access(global, 16, false, where).read += 16;
  const auto& source = emulator::machine.regions[emulator::machine.last_region].shadow;
  emulator::check_shared(shared, 16);
  emulator::access_shared(shared, 16, emulator::Access::copy, where);
  emulator::Fiber& thread = *emulator::machine.running;
  emulator::Copy copy = {shared, {}, thread.groups, global, source ? source->writes() : 0};
  memcpy(copy.bytes, global, 16);
  memset(shared, 0xff, 16);
  thread.copies.push_back(copy);
}
inline void end_copies() { emulator::machine.running->groups++; }
template <int kGroups>
inline void wait_copies() {
  emulator::Fiber& thread = *emulator::machine.running;
  std::erase_if(thread.copies, [&](const emulator::Copy& copy) {
    if (copy.group >= thread.groups - kGroups) return false;
    memcpy(copy.to, copy.bytes, 16);
    emulator::arrive(copy);
    return true;
  });
}

// Of a lane: its sums of 16 x 8, its words of a (16 x depth) and b (depth x 8).
struct MmaPart {
  float* sums;
  const uint32_t* a;
  uint32_t b[2];
};

// kWide: values of 32 bits and a depth of 8, else of 16 bits and 16. Sums are exact within a
// product, rounded once when they are added to those before.
template <class T>
inline void multiply_lanes(MmaPart* const* lanes) {
  constexpr bool kWide = sizeof(T) == 4;
  constexpr int kDepth = kWide ? 8 : 16, kInWord = 4 / sizeof(T);
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; lane++) {
    const int group = lane / 4, in_group = lane % 4;
    for (int word = 0; word < 4; word++)
      for (int i = 0; i < kInWord; i++) {
        T value;
        memcpy(&value, (const char*)&lanes[lane]->a[word] + i * sizeof(T), sizeof(T));
        const int column = in_group * kInWord + i + word / 2 * (kDepth / 2);
        a[group + word % 2 * 8][column] = to_float(value);
      }
    for (int word = 0; word < 2; word++)
      for (int i = 0; i < kInWord; i++) {
        T value;
        memcpy(&value, (const char*)&lanes[lane]->b[word] + i * sizeof(T), sizeof(T));
        b[in_group * kInWord + i + word * (kDepth / 2)][group] = to_float(value);
      }
  }
  for (int row = 0; row < 16; row++) {
    double sums[8] = {};
    for (int k = 0; k < kDepth; k++)
      for (int column = 0; column < 8; column++) sums[column] += (double)a[row][k] * b[k][column];
    for (int column = 0; column < 8; column++) {
      MmaPart& part = *lanes[row % 8 * 4 + column / 2];
      part.sums[row / 8 * 2 + column % 2] += sums[column];
    }
  }
}

template <class T>
inline void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::together<MmaPart, multiply_lanes<T>>({sums, a, {b0, b1}});
}
inline void mma_bf16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<bf16>(sums, a, b0, b1);
}
inline void mma_fp16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<fp16>(sums, a, b0, b1);
}
inline void mma_tf32(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<float>(sums, a, b0, b1);
}

inline uint32_t to_tf32(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000) & ~0x1fffu;
}

}  // namespace fused_res::cuda
