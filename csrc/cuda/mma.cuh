// Convolutions of maps in shared memory by a warp's products of small matrices: thin wrappers of
// the PTX instructions, which exist since sm_80, and the loop over a convolution's taps. In the
// emulation the wrappers' twins come from tests/cuda_emulation/emulator.h.
//
// A product takes a step of the channels in, 32 bytes of a pixel in any type, of 16 pixels (the
// rows of a matrix) to 16 channels out. Addresses are bytes from the start of shared memory.
#pragma once
#include <type_traits>

#include "platform.cuh"

#ifndef FUSED_RES_EMULATION
namespace fused_res::cuda {

// Whether the architecture that is compiled for has these instructions.
#ifdef __CUDA_ARCH__
constexpr bool kHasMma = __CUDA_ARCH__ >= 800, kHasClusters = __CUDA_ARCH__ >= 900;
#else
constexpr bool kHasMma = true, kHasClusters = true;
#endif

// Every access to shared memory goes through these two and the two after them.
template <class V>
__device__ __forceinline__ V load_shared(const char* p) {
  return *(const V*)p;
}
template <class V>
__device__ __forceinline__ void store_shared(char* p, V value) {
  *(V*)p = value;
}

// Four matrices of 8 rows of 16 bytes: lane l gives the address of row l % 8 of matrix l / 8, and
// gets the word l % 4 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(const char* row, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
}

// Starts to copy 16 bytes from global to shared memory. The copies that a thread started since
// its last end_copies are a group; wait_copies waits for all of its groups but the last kGroups.
__device__ __forceinline__ void start_copy(char* shared, const char* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
      "l"(__cvta_generic_to_global(global))
      : "memory");
}
__device__ __forceinline__ void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// sums += a b, with a of 16 rows and b of 8 columns: sums[i] is of row lane / 4 + 8 * (i / 2) and
// column lane % 4 * 2 + i % 2. Where a's and b's values lie: load_matrices, and Products below.
#define FUSED_RES_MMA(name, shape)                                                            \
  __device__ __forceinline__ void name(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, \
                                       uint32_t b1) {                                         \
    asm volatile("mma.sync.aligned." shape                                                    \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));             \
  }
FUSED_RES_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSED_RES_MMA(mma_fp16, "m16n8k16.row.col.f32.f16.f16.f32")
FUSED_RES_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSED_RES_MMA

// In a cluster, blocks of a grid that are on the device at once: the block's number, a store to the
// shared memory of another block, where that has what p points at here, and a barrier after which
// each sees what the others have stored.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return (int)rank;
}
template <class V>
__device__ __forceinline__ void store_shared_of(int rank, char* p, V value) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"((uint32_t)__cvta_generic_to_shared(p)), "r"(rank));
  if constexpr (sizeof(V) == 4)
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
  else
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(there), "l"(value) : "memory");
}
__device__ __forceinline__ void cluster_barrier() {
  __syncwarp();  // lanes may have stored different things
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// to the nearest value that TF32 has
__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

}  // namespace fused_res::cuda
#endif

namespace fused_res::cuda {

constexpr int kWarp = 32;
constexpr int kTile = 16;          // pixels, and channels out, of a product
constexpr int kStepBytes = 32;     // of a pixel, that a product takes
constexpr int kWeightBytes = 512;  // of a product: the step's channels in, by 16 channels out
constexpr int kColumns = 2;        // tiles of channels out that a warp has

// A lane's sums of 16 pixels x 16 channels out: of two mma's of 8 columns.
struct Sums {
  float v[2][4];
};

// A kind of product. start(lane, i): the pixel and the byte of a step that a lane's i-th pointer
// points at. source(lane, i): of the weights' 512 bytes lane l has the 16 from 16 l on; the channel
// in and the channel out of the i-th value of those.
struct Start {
  int pixel, byte;
};
struct Source {
  int in, out;
};

// On tensor cores. What load_matrices gives of 16 pixels x 32 bytes is what mma wants for a, in
// every type: rows 0-7 and 8-15 of the first 16 bytes, then of the second.
template <class Mma>
struct TensorCore {
  static constexpr int kPointers = 1;
  static constexpr int kMostRows = 4;               // tiles of 16 pixels that a warp has
  static constexpr int kUnrolled = 2, kSummed = 0;  // see multiply_steps
  __host__ __device__ static Start start(int lane, int) { return {lane % 16, lane / 16 * 16}; }

  template <int kUsedRows, int kUsed, int kRows>
  __device__ __forceinline__ static void multiply(Sums (&sums)[kRows][kColumns],
                                                  const char* const (&pixels)[kRows][1], int offset,
                                                  const char* const (&weights)[kColumns]) {
    const int lane = threadIdx.x % kWarp;
    uint4 b[kUsed];
#pragma unroll
    for (int j = 0; j < kUsed; j++) b[j] = load_shared<uint4>(weights[j] + lane * 16);
#pragma unroll
    for (int i = 0; i < kUsedRows; i++) {
      uint32_t a[4];
      load_matrices(pixels[i][0] + offset, a);
      Mma::prepare(a);
#pragma unroll
      for (int j = 0; j < kUsed; j++) {
        Mma::mma(sums[i][j].v[0], a, b[j].x, b[j].y);
        Mma::mma(sums[i][j].v[1], a, b[j].z, b[j].w);
      }
    }
  }
};

// Lane l has column l / 4 of both mma's, of each two pairs of channels in: 2 (l % 4) and 8 on.
template <class Element>
struct HalfProducts : TensorCore<HalfProducts<Element>> {
  using T = Element;
  static constexpr int kStep = 16;
  __host__ __device__ static Source source(int lane, int i) {
    return {lane % 4 * 2 + i % 2 + i / 2 % 2 * 8, (i / 4 ^ kPlantedFragment) * 8 + lane / 4};
  }
  __device__ static void prepare(uint32_t (&)[4]) {}
  __device__ __forceinline__ static void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    if constexpr (std::is_same_v<T, bf16>)
      mma_bf16(sums, a, b0, b1);
    else
      mma_fp16(sums, a, b0, b1);
  }
  __device__ static float weight(float v) { return v; }
};

// Lane l has column l / 4 of both mma's, of each the channels in l % 4 and 4 on.
struct Tf32Products : TensorCore<Tf32Products> {
  using T = float;
  static constexpr int kStep = 8;
  __host__ __device__ static Source source(int lane, int i) {
    return {lane % 4 + i % 2 * 4, i / 2 * 8 + lane / 4};
  }
  __device__ __forceinline__ static void prepare(uint32_t (&a)[4]) {
#pragma unroll
    for (uint32_t& word : a) word = to_tf32(word);
  }
  __device__ __forceinline__ static void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    mma_tf32(sums, a, b0, b1);
  }
  __device__ static float weight(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    bits = to_tf32(bits);
    memcpy(&v, &bits, 4);
    return v;
  }
};

// In float32, by multiply-adds: a lane's sums are those that it has of an mma, of two pixels and
// four channels out, so it points at two pixels. Weights: a row of 16 channels out for each channel
// in, in which the four of a lane are neighbours.
struct ExactProducts {
  using T = float;
  static constexpr int kMostRows = 2, kUnrolled = 1, kSummed = 4;  // more takes all registers
  static constexpr int kStep = 8, kPointers = 2;
  __host__ __device__ static Start start(int lane, int i) { return {lane / 4 + 8 * i, 0}; }
  __host__ __device__ static Source source(int lane, int i) {
    return {lane / 4, i / 2 * 8 + lane % 4 * 2 + i % 2};
  }
  __device__ static float weight(float v) { return v; }

  template <int kUsedRows, int kUsed, int kRows>
  __device__ __forceinline__ static void multiply(Sums (&sums)[kRows][kColumns],
                                                  const char* const (&pixels)[kRows][2], int offset,
                                                  const char* const (&weights)[kColumns]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float b[kUsed][4][4];
#pragma unroll
      for (int j = 0; j < kUsed; j++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          four(weights[j] + ((half * 4 + k) * 4 + lane % 4) * 16, b[j][k]);
#pragma unroll
      for (int i = 0; i < kUsedRows; i++)
#pragma unroll
        for (int p = 0; p < 2; p++) {
          float a[4];
          four(pixels[i][p] + offset + half * 16, a);
#pragma unroll
          for (int k = 0; k < 4; k++)
#pragma unroll
            for (int j = 0; j < kUsed; j++)
#pragma unroll
              for (int c = 0; c < 4; c++) {
                float& sum = sums[i][j].v[c / 2][p * 2 + c % 2];
                sum = fmaf(a[k], b[j][k][c], sum);
              }
        }
    }
  }

 private:
  __device__ __forceinline__ static void four(const char* p, float (&v)[4]) {
    const uint4 words = load_shared<uint4>(p);
    memcpy(v, &words, 16);
  }
};

// Where a convolution's steps are in its input, from a pixel on: all channels of a tap, 3x3 taps
// (or one) row by row. A tap is the whole map, shifted: the map has a border of zeros.
struct Taps {
  int offset, steps, pitch, row;  // row: bytes from a pixel to the one below
  int step = 0, column = 0;

  __device__ Taps(int taps, int steps, int pitch, int row)
      : offset(taps == 9 ? -row - pitch + kPlantedTap * pitch : 0), steps(steps), pitch(pitch),
        row(row) {}
  __device__ __forceinline__ void next() {
    offset += kStepBytes;
    if (++step < steps) return;
    step = 0, offset += pitch - steps * kStepBytes;
    if (++column < 3) return;
    column = 0, offset += row - 3 * pitch;
  }
};

// sums += `count` steps of a convolution, whose weights start at `first`, `stride` bytes a step; of
// the first kUsedRows x kUsed tiles
template <class Products, int kUsedRows, int kUsed, int kRows>
__device__ __forceinline__ void multiply_in_order(
    Sums (&sums)[kRows][kColumns], const char* const (&pixels)[kRows][Products::kPointers],
    Taps& taps, const char* const (&first)[kColumns], int stride, int count) {
  const char* weights[kColumns] = {first[0], first[1]};
#pragma unroll Products::kUnrolled
  for (int s = 0; s < count; s++) {
    Products::template multiply<kUsedRows, kUsed>(sums, pixels, taps.offset, weights);
    taps.next();
#pragma unroll
    for (int j = 0; j < kUsed; j++) weights[j] += stride;
  }
}

// The same, of each kSummed steps the sums by themselves: one float32 after the other, over all
// taps and channels, has up to three times the error of PyTorch's convolutions. Tensor cores do
// likewise within a step, and 16-bit values have errors that hide it.
template <class Products, int kUsedRows, int kUsed, int kRows>
__device__ __forceinline__ void multiply_steps(
    Sums (&sums)[kRows][kColumns], const char* const (&pixels)[kRows][Products::kPointers],
    Taps& taps, const char* const (&first)[kColumns], int stride, int count) {
  constexpr int kSummed = Products::kSummed;
  if constexpr (kSummed == 0) {
    multiply_in_order<Products, kUsedRows, kUsed>(sums, pixels, taps, first, stride, count);
  } else {
#pragma unroll 1
    for (int s = 0; s < count; s += kSummed) {
      Sums part[kRows][kColumns] = {};
      const char* const weights[kColumns] = {first[0] + s * stride, first[1] + s * stride};
      multiply_in_order<Products, kUsedRows, kUsed>(part, pixels, taps, weights, stride,
                                                    count - s < kSummed ? count - s : kSummed);
#pragma unroll
      for (int i = 0; i < kUsedRows; i++)
#pragma unroll
        for (int j = 0; j < kUsed; j++)
#pragma unroll
          for (int k = 0; k < 8; k++) sums[i][j].v[k / 4][k % 4] += part[i][j].v[k / 4][k % 4];
    }
  }
}

}  // namespace fused_res::cuda
