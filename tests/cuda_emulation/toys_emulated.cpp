// Small kernels that each need something to wait for, with it (kRight) and without: what the
// emulation must tell apart, for tests/cuda_emulation/test_emulator.py.
#define FUSED_RES_EMULATION
#include "../../csrc/cuda/mma.cuh"

#include "emulated.h"

using namespace fused_res::cuda;

namespace {

constexpr int kThreads = 64;

struct Given {
  float* out;  // of each thread of all blocks
  const float* in;
};

char* memory() {
  DYNAMIC_SHARED(uint4, words);
  return (char*)&words[0];
}
char* place(int thread) { return memory() + thread * 16; }
int global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }
int other(int offset) { return (threadIdx.x + offset) % kThreads; }

// What another warp has written.
template <bool kRight>
void block_barrier(Given a) {
  store_shared(place(threadIdx.x), 1.f);
  if (kRight) __syncthreads();
  store(a.out + global_thread(), load_shared<float>(place(other(32))));
}

// What another warp has read is written again.
template <bool kRight>
void write_after_read(Given a) {
  store_shared(place(threadIdx.x), 1.f);
  __syncthreads();
  const float value = load_shared<float>(place(other(32)));
  if (kRight) __syncthreads();
  store_shared(place(threadIdx.x), 2.f);
  store(a.out + global_thread(), value);
}

// What another lane has written.
template <bool kRight>
void warp_barrier(Given a) {
  store_shared(place(threadIdx.x), 1.f);
  if (kRight) __syncwarp();
  store(a.out + global_thread(), load_shared<float>(place(threadIdx.x ^ 1)));
}

// A warp's barrier is none of the block's.
template <bool kRight>
void barrier_of_too_few(Given a) {
  store_shared(place(threadIdx.x), 1.f);
  if (kRight)
    __syncthreads();
  else
    __syncwarp();
  store(a.out + global_thread(), load_shared<float>(place(other(32))));
}

// What a lane has written is loaded by its warp.
template <bool kRight>
void matrix(Given a) {
  store_shared(place(threadIdx.x), uint4{1, 1, 1, 1});
  if (kRight) __syncwarp();
  uint32_t words[4];
  load_matrices(place(threadIdx.x), words);
  store(a.out + global_thread(), (float)words[0]);
}

// Lanes come to a warp's instruction after loops of unlike lengths.
template <bool kRight>
void lanes_apart(Given a) {
  for (int i = 0; i < 2; i++) store_shared(place(threadIdx.x), uint4{1, 1, 1, 1});
  __syncthreads();
  for (unsigned i = 0; i < threadIdx.x % 2; i++) load_shared<float>(place(threadIdx.x));
  if (kRight) __syncwarp();
  uint32_t words[4];
  load_matrices(place(threadIdx.x), words);
  store(a.out + global_thread(), (float)words[0]);
}

void copy_own(const Given& a) {
  start_copy(place(threadIdx.x), (const char*)(a.in + threadIdx.x * 4));
  end_copies();
}

// A thread's own copy.
template <bool kRight>
void wait_for_copy(Given a) {
  copy_own(a);
  if (kRight) wait_copies<0>();
  store(a.out + global_thread(), load_shared<float>(place(threadIdx.x)));
}

// The last of two groups of copies.
template <bool kRight>
void wait_for_too_few(Given a) {
  start_copy(place(threadIdx.x + kThreads), (const char*)(a.in + threadIdx.x * 4));
  end_copies();
  copy_own(a);
  wait_copies<kRight ? 0 : 1>();
  store(a.out + global_thread(), load_shared<float>(place(threadIdx.x)));
}

// Another thread's copy, which only that one has waited for.
template <bool kRight>
void copy_of_another(Given a) {
  copy_own(a);
  wait_copies<0>();
  if (kRight) __syncthreads();
  store(a.out + global_thread(), load_shared<float>(place(other(32))));
}

// A copy to where another warp still reads.
template <bool kRight>
void copy_too_early(Given a) {
  store_shared(place(threadIdx.x), 1.f);
  __syncthreads();
  const float value = load_shared<float>(place(other(32)));
  if (kRight) __syncthreads();
  copy_own(a);
  wait_copies<0>();
  store(a.out + global_thread(), value);
}

// What is copied is written before the copy has arrived, by another warp, ...
template <bool kRight>
void source_too_early(Given a) {
  if (blockIdx.x > 0) return;
  start_copy(place(threadIdx.x), (const char*)(a.out + threadIdx.x / 2 * 4));
  end_copies();
  if (kRight) wait_copies<0>();
  __syncthreads();
  store(a.out + other(32), 1.f);
  __syncthreads();
  wait_copies<0>();
}

// ... or by the thread itself.
template <bool kRight>
void source_of_its_own(Given a) {
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  start_copy(place(0), (const char*)a.out);
  end_copies();
  if (kRight) wait_copies<0>();
  store(a.out, 1.f);
  wait_copies<0>();
}

// A byte of what is looked at in twos.
template <bool kRight>
void narrow(Given a) {
  if (kRight)
    store_shared(place(threadIdx.x), (uint16_t)1);
  else
    store_shared(place(threadIdx.x), (uint8_t)1);
}

// What another block of a cluster has written here.
template <bool kRight>
void cluster_wait(Given a) {
  cluster_barrier();
  store_shared_of(1 - cluster_rank(), place(threadIdx.x), 1.f);
  if (kRight) cluster_barrier();
  store(a.out + global_thread(), load_shared<float>(place(threadIdx.x)));
  cluster_barrier();
}

// A block's barrier is none of the cluster's.
template <bool kRight>
void cluster_of_one(Given a) {
  cluster_barrier();
  store_shared_of(1 - cluster_rank(), place(threadIdx.x), 1.f);
  if (kRight)
    cluster_barrier();
  else
    __syncthreads();
  store(a.out + global_thread(), load_shared<float>(place(threadIdx.x)));
  cluster_barrier();
}

// The other block must have started, ...
template <bool kRight>
void cluster_start(Given a) {
  if (kRight) cluster_barrier();
  store_shared_of(1 - cluster_rank(), place(threadIdx.x), 1.f);
  cluster_barrier();
  store(a.out + global_thread(), load_shared<float>(place(threadIdx.x)));
}

// ... and not ended.
template <bool kRight>
void cluster_end(Given a) {
  cluster_barrier();
  store_shared_of(1 - cluster_rank(), place(threadIdx.x), 1.f);
  store(a.out + global_thread(), 1.f);
  if (kRight) cluster_barrier();
}

// What another block of a cooperative launch has written.
template <bool kRight>
void grid_wait(Given a) {
  store(a.out + global_thread(), 1.f);
  if (kRight) grid_barrier();
  load(a.out + (global_thread() + kThreads) % (2 * kThreads));
}

// A grid's barrier is needed before what was read by another block is written, too.
template <bool kRight>
void grid_write_after_read(Given a) {
  load(a.out + (global_thread() + kThreads) % (2 * kThreads));
  if (kRight) grid_barrier();
  store(a.out + global_thread(), 1.f);
}

// Blocks that nothing orders write the same.
template <bool kRight>
void blocks_meet(Given a) {
  store(a.out + (kRight ? global_thread() : threadIdx.x), 1.f);
}

// A block reads what another one writes.
template <bool kRight>
void block_reads(Given a) {
  const int from = kRight ? global_thread() : (global_thread() + kThreads) % (2 * kThreads);
  load(a.out + from);
  store(a.out + global_thread(), 1.f);
}

// Threads of a block write the same of global memory.
template <bool kRight>
void threads_meet(Given a) {
  store(a.out + (kRight ? global_thread() : blockIdx.x * kThreads), 1.f);
}

enum class Launch { plain, cluster, grid };
struct Toy {
  const char* name;
  Launch launch;
  void (*kernels[2])(Given);
};
#define TOY(name, kind)                              \
  {                                                  \
    #name, Launch::kind, { name<false>, name<true> } \
  }
constexpr Toy kToys[] = {
    TOY(block_barrier, plain),
    TOY(write_after_read, plain),
    TOY(warp_barrier, plain),
    TOY(barrier_of_too_few, plain),
    TOY(matrix, plain),
    TOY(lanes_apart, plain),
    TOY(wait_for_copy, plain),
    TOY(wait_for_too_few, plain),
    TOY(copy_of_another, plain),
    TOY(copy_too_early, plain),
    TOY(source_too_early, plain),
    TOY(source_of_its_own, plain),
    TOY(narrow, plain),
    TOY(cluster_wait, cluster),
    TOY(cluster_of_one, cluster),
    TOY(cluster_start, cluster),
    TOY(cluster_end, cluster),
    TOY(grid_wait, grid),
    TOY(grid_write_after_read, grid),
    TOY(blocks_meet, plain),
    TOY(block_reads, plain),
    TOY(threads_meet, plain),
};

// Words `stride` apart, of `bytes` each; what that costs is known.
template <class V>
void strided(int stride, V* global) {
  store_shared(memory() + threadIdx.x * stride, V{});
  store((V*)((char*)global + threadIdx.x * stride), V{});
}

}  // namespace

extern "C" {

const char* name_of(int toy) { return toy < (int)std::size(kToys) ? kToys[toy].name : nullptr; }

// two blocks; out: of 128 values, in: of 256
const char* run_toy(int toy, bool right, float* out, const float* in, uint64_t seed) {
  return run(seed, [&] {
    const auto [name, launch, kernels] = kToys[toy];
    constexpr int kBytes = 2 * kThreads * 16;
    const Given given = {out, in};
    if (launch == Launch::grid)
      launch_together(name, kernels[right], 2, kThreads, kBytes, Stream{}, given);
    else
      launch_clusters(name, kernels[right], 2, launch == Launch::cluster ? 2 : 1, kThreads, kBytes,
                      Stream{}, given);
  });
}

const char* run_strided(int bytes, int stride, void* out) {
  return run(0, [&] {
    const auto with = [&](auto value) {
      using V = decltype(value);
      launch_clusters("strided", strided<V>, 1, 1, 32, 32 * stride + 16, Stream{}, stride, (V*)out);
    };
    bytes == 4 ? with(uint32_t{}) : bytes == 8 ? with(uint64_t{}) : with(uint4{});
  });
}

}  // extern "C"
