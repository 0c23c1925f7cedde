// bn_act on a CUDA device, on raw pointers: the kernels, how the work is cut up, and the launches.
// A pass is bound by memory, so all there is to it is to read and write each element once, 16 bytes
// at a time with several accesses in flight. Compiles with a host compiler too (platform.cuh).
//
// The unit of work is an eight: eight neighbouring elements of a run, one byte of its mask. Runs
// are those of csrc/cpu/bn_act_kernels.h: N*H*W of C channels (channels_last) or N*C of H*W pixels
// (NCHW).
#pragma once
#include "platform.cuh"

namespace fused_res::cuda {

enum class Act : int { none, relu, relu_before_add };
enum class Residual : int { none, tensor, norm };
enum class Element : int { f32, bf16, f16 };
// How a call is launched. whole: one kernel, each block has all values of its channels.
// cooperative: one kernel that keeps its elements in shared memory while the blocks, all on the
// device at once, exchange their sums. split: three kernels: sums of chunks, their merge, and the
// pass over the elements.
enum class Plan : int { automatic, whole, cooperative, split };

// What a cooperative launch has to know of a device.
struct Device {
  int multiprocessors;
  int shared_bytes;  // of a multiprocessor
};

struct Shape {
  int64_t images, channels, pixels;
  bool channels_last;
};

// A value per channel in the element type or float32; data is null where there is none.
struct Channels {
  void* data;
  int64_t stride;
  bool is_float;
};

struct ForwardNorm {
  Channels weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps;
};

struct ForwardArgs {
  Element element;
  Shape shape;
  Act act;
  Residual residual_kind;
  const void *x, *residual;
  void* y;
  uint8_t* mask;  // null: not wanted
  float* stats;   // mean and invstd of each BatchNorm; centre, scale, shift of x's; (5 or 7, C)
  ForwardNorm norm[2];
  void* scratch;  // scratch_bytes(shape, device), 16-byte aligned
  Plan plan;
  Device device;
};

struct BackwardNorm {
  Channels weight, dweight, dbias;  // dweight, dbias: contiguous, null where not wanted
  bool training;
};

struct BackwardArgs {
  Element element;
  Shape shape;
  Act act;
  bool residual_norm;  // the residual has a BatchNorm of its own
  const void *dy, *x, *residual;
  const uint8_t* mask;
  void *dx, *dresidual;  // null: not wanted
  const float* stats;
  BackwardNorm norm[2];
  bool sums;            // whether anything that is wanted needs the sums
  const double* given;  // (2 or 4, C), taken for the sums where it is not null
  void* scratch;
  Plan plan;
  Device device;
};

// --- how the work is cut up: by the shape and the device alone, so that every sum has one order

constexpr int kThreads = 256;
constexpr int kMaxWidth = 16;      // eights of a row a block takes: 256 bytes of 16-bit elements
constexpr int kWholeWidth = 2;     // the same where a block takes all rows: a 32-byte sector
constexpr int kWholeItems = 16;    // eights a thread takes where a block takes all rows
constexpr int kLeastItems = 4;     // fewer a thread, and a block costs more than its work
constexpr int64_t kBlocks = 1024;  // enough for any device, few enough for their sums to be cheap
constexpr int kSums = 4;           // doubles per channel and chunk: two of each BatchNorm
constexpr int kTable = 4;          // floats per channel and BatchNorm for the pass over elements
constexpr int kStaticShared = 17 << 10;  // bytes, of every kernel: the arrays of reduce, statistics

// A column is what shares its channels: an eight of channels (channels_last; its items are the
// rows) or one channel (NCHW; its items are the eights of its runs in all images). A block takes
// `width` columns of a chunk of items with `lanes` threads a column.
struct Walk {
  Shape shape;
  int64_t run, run_eights, columns, column_blocks, items, chunk, chunks;
  int width, lanes;

  // about `blocks` blocks; 0: one chunk
  Walk(const Shape& s, int most_width, int64_t blocks) : shape(s) {
    run = s.channels_last ? s.channels : s.pixels;
    run_eights = ceil_div(run, 8);
    columns = s.channels_last ? run_eights : s.channels;
    items = s.channels_last ? s.images * s.pixels : s.images * run_eights;
    for (width = 1; s.channels_last && width < most_width && width < columns;) width *= 2;
    lanes = kThreads / width;
    column_blocks = ceil_div(columns, width);
    chunk = items;
    if (blocks) {
      const int64_t n = smaller(blocks / column_blocks, items / (lanes * kLeastItems));
      chunk = ceil_div(ceil_div(items, n < 1 ? 1 : n), lanes) * lanes;
    }
    chunks = ceil_div(items, chunk);
  }

  unsigned blocks() const { return column_blocks * chunks; }
  __host__ __device__ int channels_of_block() const {
    return width * (shape.channels_last ? 8 : 1);
  }
  __host__ __device__ int64_t padded() const { return ceil_div(shape.channels, 8) * 8; }
  __host__ __device__ double count() const { return (double)shape.images * shape.pixels; }

  __host__ __device__ int64_t values_before(int64_t item) const {  // of a channel
    if (shape.channels_last) return item;
    return item / run_eights * run + smaller(item % run_eights * 8, run);
  }
  __host__ __device__ double values(int64_t k) const {  // of a channel in chunk k
    return values_before(smaller(items, (k + 1) * chunk)) - values_before(k * chunk);
  }
};

inline Walk whole_walk(const Shape& s) { return Walk(s, kWholeWidth, 0); }
inline Walk split_walk(const Shape& s) { return Walk(s, kMaxWidth, kBlocks); }

// Blocks of a cooperative launch that a multiprocessor has at once: registers for two, or for one
// where there are two BatchNorms.
constexpr int blocks_together(bool second) { return second ? 1 : 2; }

inline Walk cooperative_walk(const Shape& s, const Device& d, bool second) {
  return Walk(s, kMaxWidth, (int64_t)d.multiprocessors * blocks_together(second));
}

// Shared memory a cooperative launch's block may keep elements in. A block has 1 KB reserved.
inline int kept_bytes(const Device& d, bool second) {
  const int bytes = d.shared_bytes / blocks_together(second) - 1024 - kStaticShared;
  return bytes < 0 ? 0 : bytes;
}

// The scratch buffer: sums (double, [chunk][kSums][padded]), then tables (float,
// [BatchNorm][kTable] [padded]; where each block merges for itself,
// [block][BatchNorm][kTable][channels of a block]).
inline int64_t scratch_bytes(const Shape& shape, const Device& device) {
  int64_t most = 0;
  for (const Walk& w :
       {whole_walk(shape), split_walk(shape), cooperative_walk(shape, device, false),
        cooperative_walk(shape, device, true)}) {
    const int64_t of_blocks = (int64_t)w.blocks() * w.channels_of_block();
    const int64_t tables = of_blocks > w.padded() ? of_blocks : w.padded();
    const int64_t bytes = w.chunks * kSums * w.padded() * 8 + tables * 2 * kTable * 4;
    if (bytes > most) most = bytes;
  }
  return most;
}

__device__ inline double* sums_of(const Walk& w, void* scratch, int64_t chunk, int which) {
  return (double*)scratch + (chunk * kSums + which) * w.padded();
}

// A row per BatchNorm and entry, a column per channel.
struct Tables {
  float* data;
  int64_t stride;
  __device__ float* row(int norm, int which) const {
    return data + (norm * kTable + which) * stride;
  }
};
__device__ inline Tables tables_of_all(const Walk& w, void* scratch) {
  return {(float*)sums_of(w, scratch, w.chunks, 0), w.padded()};
}
__device__ inline Tables tables_of_block(const Walk& w, void* scratch) {
  const int64_t channels = w.channels_of_block();
  float* own = tables_of_all(w, scratch).data + blockIdx.x * 2 * kTable * channels;
  return {own - blockIdx.x % w.column_blocks * channels, channels};
}

// What a thread works on: every `lanes`-th item of [first, end) of one column.
struct Part {
  int column_of_block, lane;
  int64_t column, chunk, first, end;
  bool in_range;

  // `reversed`: the last chunk first, whose elements the pass before left in the L2 cache
  __device__ Part(const Walk& w, bool reversed) {
    column_of_block = threadIdx.x % w.width;
    lane = threadIdx.x / w.width;
    chunk = blockIdx.x / w.column_blocks;
    column = blockIdx.x % w.column_blocks * w.width + column_of_block;
    if (reversed) chunk = w.chunks - 1 - chunk;
    in_range = column < w.columns;
    first = chunk * w.chunk;
    end = in_range ? smaller(w.items, first + w.chunk) : first;
  }
};

// An eight: its first element, how many of its elements exist (0: nothing to do), its mask byte.
struct Place {
  int64_t element, mask;
  int valid;
};

// The places of a thread. kVector: eights are whole and their addresses multiples of 16 bytes.
template <bool kChannelsLast, bool kVector>
struct Cursor {
  const Walk& w;
  int64_t run, eight, run_step, eight_step;

  __device__ Cursor(const Walk& w, int64_t column, int64_t item, int64_t step) : w(w) {
    if (kChannelsLast) {
      run = item, eight = column, run_step = step, eight_step = 0;
    } else {
      run = item / w.run_eights * w.shape.channels + column, eight = item % w.run_eights;
      run_step = step / w.run_eights * w.shape.channels, eight_step = step % w.run_eights;
    }
  }
  __device__ Place place() const {
    const int64_t element = run * w.run + eight * 8;
    if (kVector) return {element, element / 8, 8};
    return {element, run * w.run_eights + eight, (int)smaller(8, w.run - eight * 8)};
  }
  __device__ void next() {
    run += run_step, eight += eight_step;
    if (!kChannelsLast && eight >= w.run_eights) eight -= w.run_eights, run += w.shape.channels;
  }
};

// Eights of one tensor a thread has in flight: 64 bytes, or 32 where registers are short.
template <class T, bool kShort>
constexpr int kBatchOf = (kShort ? 4 : 8) / sizeof(T);

// body(places, i) for a thread's eights, kBatch at a time; the first is its i-th
template <int kBatch, bool kChannelsLast, bool kVector, class Body>
__device__ __forceinline__ void each_batch(const Walk& w, const Part& part, const Body& body) {
  int64_t item = part.first + part.lane;
  Cursor<kChannelsLast, kVector> cursor(w, part.column, item, w.lanes);
  for (int i = 0; item < part.end; i += kBatch) {
    Place places[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      places[u] = cursor.place();
      if (item >= part.end) places[u].valid = 0;
      cursor.next();
      item += w.lanes;
    }
    body(places, i);
  }
}

// --- elements

template <class T>
struct alignas(16) Eight {
  T v[8];
  __device__ float operator[](int k) const { return to_float(v[k]); }
};

template <bool kVector>
__device__ __forceinline__ bool exists(const Place& place, int k) {
  return kVector ? place.valid != 0 : k < place.valid;
}

template <bool kVector, class T>
__device__ __forceinline__ Eight<T> load_eight(const void* tensor, const Place& place) {
  Eight<T> e = {};
  const T* p = (const T*)tensor + place.element + kPlantedLoad;
  if (kVector) {
    if (place.valid)
#pragma unroll
      for (int i = 0; i < (int)sizeof(T) / 2; i++) {
        const uint4 words = load((const uint4*)p + i);
        memcpy((char*)e.v + 16 * i, &words, 16);
      }
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (k < place.valid) e.v[k] = load(p + k);
  }
  return e;
}

template <bool kVector, class T>
__device__ __forceinline__ void store_eight(void* tensor, const Place& place, const float (&v)[8]) {
  T* p = (T*)tensor + place.element + kPlantedStore;
  Eight<T> e;
#pragma unroll
  for (int k = 0; k < 8; k++) from_float(v[k], e.v[k]);
  if (kVector) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
      uint4 words;
      memcpy(&words, (const char*)e.v + 16 * i, 16);
      store((uint4*)p + i, words);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (k < place.valid) store(p + k, e.v[k]);
  }
}

// Eights that stay in shared memory from one pass to the next: the first `slots` of each thread, of
// `count` tensors. A thread reads back what it wrote itself, so there is nothing to wait for, and
// neighbours are 16 bytes apart, so no two meet in a bank.
template <class T>
struct Kept {
  static constexpr bool kKeeps = true;
  static constexpr int kWords = sizeof(T) / 2;  // of 16 bytes, an eight has
  int slots, tensors;                           // bit i: tensor i is kept

  __host__ __device__ Kept(int bytes, int count, int tensors)
      : slots(bytes / (kThreads * 16 * kWords * count)), tensors(tensors) {}
  __host__ __device__ int bytes(int count) const { return slots * kThreads * 16 * kWords * count; }

  __device__ bool has(int tensor, int i) const { return i < slots && tensors >> tensor & 1; }
  __device__ int index(int tensor, int i, int word) const {
    return ((tensor * slots + i) * kWords + word) * kThreads + threadIdx.x;
  }
  __device__ void put(int tensor, int i, const Eight<T>& e) const {
    DYNAMIC_SHARED(uint4, words);
    if (!has(tensor, i)) return;
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      uint4 word;
      memcpy(&word, (const char*)e.v + 16 * k, 16);
      words[index(tensor, i, k)] = word;
    }
  }
  __device__ Eight<T> get(int tensor, int i) const {
    DYNAMIC_SHARED(uint4, words);
    Eight<T> e;
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      const uint4 word = words[index(tensor, i, k)];
      memcpy((char*)e.v + 16 * k, &word, 16);
    }
    return e;
  }
};
template <class T>
struct NotKept {
  static constexpr bool kKeeps = false;
  __device__ bool has(int, int) const { return false; }
  __device__ void put(int, int, const Eight<T>&) const {}
  __device__ Eight<T> get(int, int) const { return {}; }
};

template <bool kVector, class T, class Keep>
__device__ __forceinline__ Eight<T> load_kept(const Keep& kept, int tensor, int i, const void* data,
                                              const Place& place) {
  if (kept.has(tensor, i)) return kept.get(tensor, i);
  return load_eight<kVector, T>(data, place);
}

// Channels of a column: eight in channels_last, one in NCHW.
template <bool kChannelsLast>
constexpr int kChannelsOf = kChannelsLast ? 8 : 1;

template <bool kChannelsLast>
__device__ inline int64_t channel_of(int64_t column) {
  return column * kChannelsOf<kChannelsLast>;
}

// a float per channel of a column; those past the last channel read as the last
template <bool kChannelsLast, bool kVector>
__device__ __forceinline__ void load_channels(const float* array, const Walk& w, const Part& part,
                                              float (&values)[kChannelsOf<kChannelsLast>]) {
  const int64_t c = channel_of<kChannelsLast>(part.column);
  if constexpr (kChannelsLast && kVector) {  // then rows of channels are multiples of 32 bytes
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 words = load((const uint4*)(array + c) + i);
      memcpy(values + 4 * i, &words, 16);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kChannelsOf<kChannelsLast>; k++)
      values[k] = load(array + smaller(c + k, w.shape.channels - 1));
  }
}

template <class T>
__device__ inline double load_channel(const Channels& a, int64_t c, double missing) {
  if (!a.data) return missing;
  if (a.is_float) return load((const float*)a.data + c * a.stride);
  return to_float(load((const T*)a.data + c * a.stride));
}
template <class T>
__device__ inline void store_channel(const Channels& a, int64_t c, double value) {
  if (!a.data) return;
  if (a.is_float) return store((float*)a.data + c * a.stride, (float)value);
  T narrow;
  from_float((float)value, narrow);
  store((T*)a.data + c * a.stride, narrow);
}

// --- sums over a block

constexpr int kReduced = 8;         // values a thread adds up at a time
__device__ inline auto reduced() {  // one array for all instances of reduce
  SHARED(double, sums, kReduced* kThreads);
  return sums;
}

// Adds up `values` of the `lanes` threads of each column, thread t being lane t / width of column
// t % width, in a fixed order. Every thread gets its column's totals.
template <int kValues>
__device__ inline void reduce(double (&values)[kValues], int width) {
  constexpr int kAtOnce = kValues < kReduced ? kValues : kReduced;
  static_assert(kValues % kAtOnce == 0);
  const auto sums = reduced();
  const int t = threadIdx.x;
#pragma unroll
  for (int first = 0; first < kValues; first += kAtOnce) {
    __syncthreads();  // the last totals have been read
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) sums[k * kThreads + t] = values[first + k];
    for (int half = kThreads / 2; half >= width; half /= 2) {
      SYNC_BEFORE_REDUCTION();
      if (t < half)
#pragma unroll
        for (int k = 0; k < kAtOnce; k++)
          sums[k * kThreads + t] = sums[k * kThreads + t] + sums[k * kThreads + t + half];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) values[first + k] = sums[k * kThreads + t % width];
  }
}

__device__ inline float median(float a, float b, float c) {
  return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
}

// Mean and sum of squared deviations of a part's channels: done(channel, mean, m2) in one thread
// each. Sums are of x less a shift, the median of three of its values, which an outlier does not
// move; in float over a few values, then in double.
template <class T, bool kChannelsLast, bool kVector, class Keep, class Done>
__device__ __forceinline__ void statistics(const void* x, const Walk& w, const Part& part,
                                           const Keep& kept, int tensor, const Done& done) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>, kBatch = kBatchOf<T, false>;
  SHARED(float, shifts, kMaxWidth * 8);
  __syncthreads();  // an earlier call's shifts have been read
  if (part.lane == 0 && part.in_range) {
    const int64_t items[3] = {part.first, (part.first + part.end) / 2, part.end - 1};
    float samples[3][kChannels];
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const Place p = Cursor<kChannelsLast, kVector>(w, part.column, items[i], 0).place();
#pragma unroll
      for (int k = 0; k < kChannels; k++)
        samples[i][k] = k < p.valid ? to_float(load((const T*)x + p.element + k)) : 0.f;
    }
#pragma unroll
    for (int k = 0; k < kChannels; k++)
      shifts[part.column_of_block * kChannels + k] =
          median(samples[0][k], samples[1][k], samples[2][k]);
  }
  __syncthreads();
  float shift[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; k++)
    shift[k] = part.in_range ? shifts[part.column_of_block * kChannels + k] : 0.f;

  double sums[2 * kChannels] = {};  // of x - shift, and of its square
  each_batch<kBatch, kChannelsLast, kVector>(w, part, [&](const Place(&places)[kBatch], int i) {
    Eight<T> eights[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) eights[u] = load_eight<kVector, T>(x, places[u]);
#pragma unroll
    for (int u = 0; u < kBatch; u++)
      if (places[u].valid) kept.put(tensor, i + u, eights[u]);
    float s[kChannels] = {}, q[kChannels] = {};
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (!exists<kVector>(places[u], k)) continue;
        const int c = kChannelsLast ? k : 0;
        const float d = eights[u][k] - shift[c];
        s[c] += d;
        q[c] += d * d;
      }
      if (kChannelsLast && u != kBatch - 1) continue;  // eight values of a channel at most
#pragma unroll
      for (int c = 0; c < kChannels; c++) {
        sums[c] += s[c], sums[kChannels + c] += q[c];
        s[c] = q[c] = 0;
      }
    }
  });
  reduce(sums, w.width);
  if (part.lane != 0 || !part.in_range) return;
  const double n = w.values(part.chunk);
#pragma unroll
  for (int k = 0; k < kChannels; k++) {
    const int64_t c = channel_of<kChannelsLast>(part.column) + k;
    const double m2 = sums[kChannels + k] - sums[k] * sums[k] / n;
    if (c < w.shape.channels) done(c, shift[k] + sums[k] / n, m2 < 0 ? 0 : m2);  // NaN stays NaN
  }
}

// --- forward

// where stats have x's centre, scale and shift
__host__ __device__ inline float* affine_of(const ForwardArgs& a) {
  return a.stats + (a.residual_kind == Residual::norm ? 4 : 2) * a.shape.channels;
}

// All statistics of channel c of one BatchNorm are known: the table {centre, scale, shift} of
// y = (x - centre) * scale + shift; and, if `first`, running statistics and what backward wants.
template <class T>
__device__ inline void finish_forward(const ForwardArgs& a, const Walk& w, const Tables& tables,
                                      bool first, int which, int64_t c, double mean, double m2) {
  const ForwardNorm& n = a.norm[which];
  double var = m2 / w.count();
  if (!n.training) {
    mean = load_channel<T>(n.running_mean, c, 0);
    var = load_channel<T>(n.running_var, c, 1);
  } else if (first) {
    const double unbiased = m2 / (w.count() - 1), momentum = n.momentum;
    const double running_mean = load_channel<T>(n.running_mean, c, 0);
    const double running_var = load_channel<T>(n.running_var, c, 1);
    store_channel<T>(n.running_mean, c, (1 - momentum) * running_mean + momentum * mean);
    store_channel<T>(n.running_var, c, (1 - momentum) * running_var + momentum * unbiased);
  }
  const double invstd = 1 / sqrt(var + n.eps);
  const double scale = load_channel<T>(n.weight, c, 1) * invstd;
  const float rounded = (float)mean;
  if (first) {
    store(a.stats + 2 * which * w.shape.channels + c, rounded);
    store(a.stats + (2 * which + 1) * w.shape.channels + c, (float)invstd);
  }
  // A mean under a standard deviation goes into the shift, which rounds once less than x - mean;
  // a larger one is subtracted first, and the shift takes what rounding it lost.
  const float centre = fabs(mean) * invstd < 1 ? 0.f : rounded;
  const double bias = load_channel<T>(n.bias, c, 0);
  const float shift = (float)(bias + ((double)centre - mean) * scale);
  if (first && which == 0) {
    float* affine = affine_of(a) + c;
    store(affine, centre);
    store(affine + w.shape.channels, (float)scale);
    store(affine + 2 * w.shape.channels, shift);
  }
  store(tables.row(which, 0) + c, centre);
  store(tables.row(which, 1) + c, (float)scale);
  store(tables.row(which, 2) + c, shift);
  if (which == 1 && a.act != Act::relu_before_add) {  // one shift for both, added after both
    float* main = tables.row(0, 2) + c;
    store(main, load(main) + shift);
  }
}

// y and mask of a part
template <class T, bool kChannelsLast, bool kVector, bool kSecond, class Keep>
__device__ __forceinline__ void apply(const ForwardArgs& a, const Walk& w, const Tables& tables,
                                      const Part& part, const Keep& kept) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>;
  constexpr int kBatch = kBatchOf < T, kChannelsLast && kSecond > ;
  if (part.first + part.lane >= part.end) return;
  float centre[2][kChannels], scale[2][kChannels], shift[2][kChannels];
  const bool second = kSecond && a.residual_kind == Residual::norm;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (i == 1 && !second) break;
    load_channels<kChannelsLast, kVector>(tables.row(i, 0), w, part, centre[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 1), w, part, scale[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 2), w, part, shift[i]);
  }
  const bool before_add = a.act == Act::relu_before_add;
  each_batch<kBatch, kChannelsLast, kVector>(w, part, [&](const Place(&places)[kBatch], int i) {
    Eight<T> xs[kBatch], residuals[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      xs[u] = load_kept<kVector, T>(kept, 0, i + u, a.x, places[u]);
      if (a.residual_kind != Residual::none)
        residuals[u] = load_kept<kVector, T>(kept, 1, i + u, a.residual, places[u]);
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      if (places[u].valid == 0) continue;
      float v[8];
      uint32_t bits = 0;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const int c = kChannelsLast ? k : 0;
        float value = (xs[u][k] - centre[0][c]) * scale[0][c] + shift[0][c];
        float other = -0.f;  // the value that changes nothing it is added to
        if (a.residual_kind != Residual::none) other = residuals[u][k];
        if (second) {
          other = (other - centre[1][c]) * scale[1][c];
          if (before_add) other += shift[1][c];
        }
        if (!before_add) value += other;
        if (a.act != Act::none) {
          const bool positive = !(value <= 0);  // NaN passes
          if (k < places[u].valid) bits |= (uint32_t)positive << (k ^ kPlantedBit);
          value = positive ? value : 0.f;
        }
        if (before_add) value += other;
        v[k] = value;
      }
      store_eight<kVector, T>(a.y, places[u], v);
      if (a.mask) store(a.mask + places[u].mask, (uint8_t)bits);
    }
  });
}

// The chunks' means and squared deviations become the batch's: first all means, then the squares
// about it (Chan, Golub and LeVeque 1979). The block's threads share `channels` channels, one of
// them c; its sums are complete in lane 0, which calls finish(which BatchNorm, mean, m2).
template <class Finish>
__device__ inline void merge_statistics(const ForwardArgs& a, const Walk& w, int64_t c,
                                        int channels, const Finish& finish) {
  const int lane = threadIdx.x / channels, lanes = kThreads / channels;
  const bool in_range = c < w.shape.channels;
  const int64_t chunks = in_range ? w.chunks : 0;
#pragma unroll
  for (int which = 0; which < 2; which++) {
    if (which == 1 && a.residual_kind != Residual::norm) break;
    double mean[1] = {}, m2[1] = {};
    if (a.norm[which].training) {
      for (int64_t k = lane; k < chunks; k += lanes)
        mean[0] += w.values(k) * load(sums_of(w, a.scratch, k, 2 * which) + c);
      reduce(mean, channels);
      mean[0] /= w.count();
      for (int64_t k = lane; k < chunks; k += lanes) {
        const double delta = load(sums_of(w, a.scratch, k, 2 * which) + c) - mean[0];
        m2[0] += load(sums_of(w, a.scratch, k, 2 * which + 1) + c) + w.values(k) * delta * delta;
      }
      reduce(m2, channels);
    }
    if (in_range && lane == 0) finish(which, mean[0], m2[0]);
  }
}

template <class T>
__device__ inline void merge_forward(const ForwardArgs& a, const Walk& w, const Tables& tables,
                                     bool first, int64_t c, int channels) {
  merge_statistics(a, w, c, channels, [&](int which, double mean, double m2) {
    finish_forward<T>(a, w, tables, first, which, c, mean, m2);
  });
}

// where a part's statistics wait for their merge
__device__ inline auto kept_sums(const ForwardArgs& a, const Walk& w, const Part& part, int which) {
  double* sums = sums_of(w, a.scratch, part.chunk, 2 * which);
  const int64_t padded = w.padded();
  return [=](int64_t c, double mean, double m2) {
    store(sums + c, mean);
    store(sums + padded + c, m2);
  };
}

template <class T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    statistics_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w) {
  const int which = blockIdx.y == 1 || !a.norm[0].training;
  const Part part(w, false);
  statistics<T, kChannelsLast, kVector>(which ? a.residual : a.x, w, part, NotKept<T>{}, which,
                                        kept_sums(a, w, part, which));
}

constexpr int kMergeChannels = 8;  // of a block of the merge kernels: 64 bytes of doubles

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    merge_forward_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w) {
  const int64_t c = (int64_t)blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels;
  merge_forward<T>(a, w, tables_of_all(w, a.scratch), true, c, kMergeChannels);
}

// mean, m2 and number of values: (3, C)
__global__ void __launch_bounds__(kThreads, 1)
    merge_statistics_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w,
                            double* out) {
  const int64_t c = (int64_t)blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels;
  merge_statistics(a, w, c, kMergeChannels, [&](int, double mean, double m2) {
    store(out + c, mean);
    store(out + w.shape.channels + c, m2);
    store(out + 2 * w.shape.channels + c, w.count());
  });
}

template <class T, bool kChannelsLast, bool kVector, bool kSecond>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 1)
    apply_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w) {
  apply<T, kChannelsLast, kVector, kSecond>(a, w, tables_of_all(w, a.scratch), Part(w, true),
                                            NotKept<T>{});
}

// y and mask once more, by the affine that stats have
template <class T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 1)
    reapply_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w) {
  apply<T, kChannelsLast, kVector, false>(a, w, {affine_of(a), w.shape.channels}, Part(w, true),
                                          NotKept<T>{});
}

// one chunk: a block has all values of its channels
template <class T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads, 1)
    whole_forward_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Walk w) {
  const Part part(w, false);
  const Tables tables = tables_of_all(w, a.scratch);
  for (int which = 0; which < (a.residual_kind == Residual::norm ? 2 : 1); which++) {
    const auto finish = [&](int64_t c, double mean, double m2) {
      finish_forward<T>(a, w, tables, true, which, c, mean, m2);
    };
    if (a.norm[which].training)
      statistics<T, kChannelsLast, kVector>(which ? a.residual : a.x, w, part, NotKept<T>{}, which,
                                            finish);
    else if (part.lane == 0 && part.in_range)
      for (int k = 0; k < kChannelsOf<kChannelsLast>; k++) {
        const int64_t c = channel_of<kChannelsLast>(part.column) + k;
        if (c < w.shape.channels) finish(c, 0, 0);
      }
  }
  __syncthreads();
  apply<T, kChannelsLast, kVector, true>(a, w, tables, part, NotKept<T>{});
}

// All blocks at once: each keeps what it reads for the statistics, merges those of all blocks for
// its own channels, and goes on from what it kept. The blocks of the first chunk write what there
// is one of.
template <class T, bool kChannelsLast, bool kSecond>
__global__ void __launch_bounds__(kThreads, blocks_together(kSecond))
    cooperative_forward_kernel(const __grid_constant__ ForwardArgs a,
                               const __grid_constant__ Walk w,
                               const __grid_constant__ Kept<T> kept) {
  const Part part(w, false);
  if (a.norm[0].training)
    statistics<T, kChannelsLast, true>(a.x, w, part, kept, 0, kept_sums(a, w, part, 0));
  if (kSecond && a.norm[1].training)
    statistics<T, kChannelsLast, true>(a.residual, w, part, kept, 1, kept_sums(a, w, part, 1));
  BARRIER_BEFORE_MERGE();
  const int channels = w.channels_of_block();
  const int64_t c = blockIdx.x % w.column_blocks * channels + threadIdx.x % channels;
  const Tables tables = tables_of_block(w, a.scratch);
  merge_forward<T>(a, w, tables, part.chunk == 0, c, channels);
  __syncthreads();
  apply<T, kChannelsLast, true, kSecond>(a, w, tables, part, kept);
}

// --- backward

// Sums of g and g * (x - mean) of a part's channels, and of the residual's BatchNorm: done(channel,
// sums) in one thread each.
template <class T, bool kChannelsLast, bool kVector, bool kSecond, class Keep, class Done>
__device__ __forceinline__ void gradient_sums(const BackwardArgs& a, const Walk& w,
                                              const Part& part, const Keep& kept,
                                              const Done& done) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>;
  constexpr int kBatch = kBatchOf < T, kChannelsLast || kSecond > ;
  const bool second = kSecond && a.residual_norm;
  float mean[2][kChannels] = {};
  if (part.in_range) load_channels<kChannelsLast, kVector>(a.stats, w, part, mean[0]);
  if (part.in_range && second)
    load_channels<kChannelsLast, kVector>(a.stats + 2 * w.shape.channels, w, part, mean[1]);
  constexpr int kWanted = kSecond ? kSums : 2;
  double sums[kWanted * kChannels] = {};
  each_batch<kBatch, kChannelsLast, kVector>(w, part, [&](const Place(&places)[kBatch], int i) {
    Eight<T> dys[kBatch], xs[kBatch], residuals[kBatch];
    uint32_t bits[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      dys[u] = load_eight<kVector, T>(a.dy, places[u]);
      xs[u] = load_eight<kVector, T>(a.x, places[u]);
      if (second) residuals[u] = load_eight<kVector, T>(a.residual, places[u]);
      bits[u] = 0xff;
      if (a.act != Act::none && places[u].valid) bits[u] = load(a.mask + places[u].mask);
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      if (places[u].valid == 0) continue;
      kept.put(0, i + u, dys[u]);
      kept.put(1, i + u, xs[u]);
      if (second) kept.put(2, i + u, residuals[u]);
    }
    float s[kWanted][kChannels] = {};
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (!exists<kVector>(places[u], k)) continue;
        const int c = kChannelsLast ? k : 0;
        const float raw = dys[u][k], g = bits[u] >> k & 1 ? raw : 0.f;
        s[0][c] += g;
        s[1][c] += g * (xs[u][k] - mean[0][c]);
        if (kSecond && second) {  // a ReLU before the add does not touch the residual's gradient
          const float g2 = a.act == Act::relu_before_add ? raw : g;
          s[2][c] += g2;
          s[3][c] += g2 * (residuals[u][k] - mean[1][c]);
        }
      }
      if (kChannelsLast && u != kBatch - 1) continue;
#pragma unroll
      for (int i = 0; i < kWanted * kChannels; i++) {
        float& part_sum = s[i / kChannels][i % kChannels];
        sums[i] += part_sum, part_sum = 0;
      }
    }
  });
  reduce(sums, w.width);
  if (part.lane != 0 || !part.in_range) return;
#pragma unroll
  for (int k = 0; k < kChannels; k++) {
    const int64_t c = channel_of<kChannelsLast>(part.column) + k;
    if (c >= w.shape.channels) continue;
    double of_channel[kSums] = {};
#pragma unroll
    for (int i = 0; i < kWanted; i++) of_channel[i] = sums[i * kChannels + k];
    done(c, of_channel);
  }
}

// All sums of channel c are known: the table {mean, scale, slope, offset} of
// dx = scale * g - (offset + slope * (x - mean)); and, if `first`, its parameters' gradients.
template <class T>
__device__ inline void finish_backward(const BackwardArgs& a, const Walk& w, const Tables& tables,
                                       bool first, int which, int64_t c, double sum_g,
                                       double sum_gx) {
  const BackwardNorm& n = a.norm[which];
  const float mean = load(a.stats + 2 * which * w.shape.channels + c);
  const double invstd = load(a.stats + (2 * which + 1) * w.shape.channels + c);
  const double dweight = sum_gx * invstd;
  if (first) {
    store_channel<T>(n.dweight, c, dweight);
    store_channel<T>(n.dbias, c, sum_g);
  }
  store(tables.row(which, 0) + c, mean);
  const double scale = load_channel<T>(n.weight, c, 1) * invstd;
  store(tables.row(which, 1) + c, (float)scale);
  store(tables.row(which, 2) + c, (float)(scale * invstd * dweight / w.count()));
  store(tables.row(which, 3) + c, (float)(scale * sum_g / w.count()));
}

// dx and dresidual of a part
template <class T, bool kChannelsLast, bool kVector, bool kSecond, class Keep>
__device__ __forceinline__ void gradients(const BackwardArgs& a, const Walk& w,
                                          const Tables& tables, const Part& part,
                                          const Keep& kept) {
  constexpr int kChannels = kChannelsOf<kChannelsLast>;
  constexpr int kBatch = kBatchOf < T, kSecond || Keep::kKeeps > ;  // shared memory is near
  if (part.first + part.lane >= part.end) return;
  const bool second = kSecond && a.residual_norm && a.dresidual;
  const bool reads_x = a.dx && a.norm[0].training;
  const bool reads_residual = second && a.norm[1].training;
  float mean[2][kChannels], scale[2][kChannels], slope[2][kChannels], offset[2][kChannels];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (i == 1 && !second) break;
    load_channels<kChannelsLast, kVector>(tables.row(i, 0), w, part, mean[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 1), w, part, scale[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 2), w, part, slope[i]);
    load_channels<kChannelsLast, kVector>(tables.row(i, 3), w, part, offset[i]);
  }
  each_batch<kBatch, kChannelsLast, kVector>(w, part, [&](const Place(&places)[kBatch], int i) {
    Eight<T> dys[kBatch], xs[kBatch], residuals[kBatch];
    uint32_t bits[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      dys[u] = load_kept<kVector, T>(kept, 0, i + u, a.dy, places[u]);
      if (reads_x) xs[u] = load_kept<kVector, T>(kept, 1, i + u, a.x, places[u]);
      if (reads_residual)
        residuals[u] = load_kept<kVector, T>(kept, 2, i + u, a.residual, places[u]);
      bits[u] = 0xff;
      if (a.act != Act::none && places[u].valid) bits[u] = load(a.mask + places[u].mask);
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      if (places[u].valid == 0) continue;
      float dx[8], dresidual[8];
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const int c = kChannelsLast ? k : 0;
        const float raw = dys[u][k], g = bits[u] >> k & 1 ? raw : 0.f;
        dx[k] = g * scale[0][c];
        if (reads_x) dx[k] -= offset[0][c] + slope[0][c] * (xs[u][k] - mean[0][c]);
        dresidual[k] = a.act == Act::relu_before_add ? raw : g;
        if (second) dresidual[k] *= scale[1][c];
        if (reads_residual)
          dresidual[k] -= offset[1][c] + slope[1][c] * (residuals[u][k] - mean[1][c]);
      }
      if (a.dx) store_eight<kVector, T>(a.dx, places[u], dx);
      if (a.dresidual) store_eight<kVector, T>(a.dresidual, places[u], dresidual);
    }
  });
}

// as merge_forward
template <class T>
__device__ inline void merge_backward(const BackwardArgs& a, const Walk& w, const Tables& tables,
                                      bool first, int64_t c, int channels) {
  const int lane = threadIdx.x / channels, lanes = kThreads / channels;
  const bool in_range = c < w.shape.channels;
  const int64_t chunks = in_range && a.sums ? w.chunks : 0;
#pragma unroll
  for (int which = 0; which < 2; which++) {
    if (which == 1 && !a.residual_norm) break;
    double sums[2] = {};
    for (int64_t k = lane; k < chunks; k += lanes)
#pragma unroll
      for (int i = 0; i < 2; i++) sums[i] += load(sums_of(w, a.scratch, k, 2 * which + i) + c);
    if (a.sums) reduce(sums, channels);
    if (a.given && in_range)
#pragma unroll
      for (int i = 0; i < 2; i++) sums[i] = load(a.given + (2 * which + i) * w.shape.channels + c);
    if (in_range && lane == 0) finish_backward<T>(a, w, tables, first, which, c, sums[0], sums[1]);
  }
}

template <bool kSecond>
__device__ inline auto kept_sums(const BackwardArgs& a, const Walk& w, const Part& part) {
  double* sums = sums_of(w, a.scratch, part.chunk, 0);
  const int64_t padded = w.padded();
  return [=](int64_t c, const double (&of_channel)[kSums]) {
#pragma unroll
    for (int i = 0; i < (kSecond ? kSums : 2); i++) store(sums + i * padded + c, of_channel[i]);
  };
}

template <class T, bool kChannelsLast, bool kVector, bool kSecond>
__global__ void __launch_bounds__(kThreads, kVector && !kSecond ? 2 : 1)
    gradient_sums_kernel(const __grid_constant__ BackwardArgs a, const __grid_constant__ Walk w) {
  const Part part(w, false);
  gradient_sums<T, kChannelsLast, kVector, kSecond>(a, w, part, NotKept<T>{},
                                                    kept_sums<kSecond>(a, w, part));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    merge_backward_kernel(const __grid_constant__ BackwardArgs a, const __grid_constant__ Walk w) {
  const int64_t c = (int64_t)blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels;
  merge_backward<T>(a, w, tables_of_all(w, a.scratch), true, c, kMergeChannels);
}

template <class T, bool kChannelsLast, bool kVector, bool kSecond>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 1)
    gradients_kernel(const __grid_constant__ BackwardArgs a, const __grid_constant__ Walk w) {
  gradients<T, kChannelsLast, kVector, kSecond>(a, w, tables_of_all(w, a.scratch), Part(w, true),
                                                NotKept<T>{});
}

template <class T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kThreads, 1)
    whole_backward_kernel(const __grid_constant__ BackwardArgs a, const __grid_constant__ Walk w) {
  const Part part(w, false);
  const Tables tables = tables_of_all(w, a.scratch);
  const auto finish = [&](int64_t c, const double (&sums)[kSums]) {
    finish_backward<T>(a, w, tables, true, 0, c, sums[0], sums[1]);
    if (a.residual_norm) finish_backward<T>(a, w, tables, true, 1, c, sums[2], sums[3]);
  };
  const double none[kSums] = {};
  if (a.sums)
    gradient_sums<T, kChannelsLast, kVector, true>(a, w, part, NotKept<T>{}, finish);
  else if (part.lane == 0 && part.in_range)
    for (int k = 0; k < kChannelsOf<kChannelsLast>; k++) {
      const int64_t c = channel_of<kChannelsLast>(part.column) + k;
      if (c < w.shape.channels) finish(c, none);
    }
  __syncthreads();
  if (a.dx || a.dresidual)
    gradients<T, kChannelsLast, kVector, true>(a, w, tables, part, NotKept<T>{});
}

template <class T, bool kChannelsLast, bool kSecond>
__global__ void __launch_bounds__(kThreads, blocks_together(kSecond))
    cooperative_backward_kernel(const __grid_constant__ BackwardArgs a,
                                const __grid_constant__ Walk w,
                                const __grid_constant__ Kept<T> kept) {
  const Part part(w, false);
  gradient_sums<T, kChannelsLast, true, kSecond>(a, w, part, kept, kept_sums<kSecond>(a, w, part));
  BARRIER_BEFORE_MERGE();
  const int channels = w.channels_of_block();
  const int64_t c = blockIdx.x % w.column_blocks * channels + threadIdx.x % channels;
  const Tables tables = tables_of_block(w, a.scratch);
  merge_backward<T>(a, w, tables, part.chunk == 0, c, channels);
  __syncthreads();
  if (a.dx || a.dresidual) gradients<T, kChannelsLast, true, kSecond>(a, w, tables, part, kept);
}

// --- launches

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

inline bool aligned(const void* p) { return (uintptr_t)p % 16 == 0; }  // null is

inline int bytes_of(Element e) { return e == Element::f32 ? 4 : 2; }

// The plan of a call that reads `tensors` tensors twice, one of two BatchNorms if `second`.
inline Plan plan_of(Plan asked, const Shape& shape, Element element, const Device& device,
                    bool second, int tensors, bool vector) {
  if (asked == Plan::whole || asked == Plan::split) return asked;
  const Walk whole = whole_walk(shape), together = cooperative_walk(shape, device, second);
  const bool can = vector && tensors &&
                   together.blocks() <= (int64_t)device.multiprocessors * blocks_together(second);
  if (asked == Plan::cooperative) return can ? Plan::cooperative : Plan::split;
  if (whole.items <= (int64_t)whole.lanes * kWholeItems) return Plan::whole;
  // worth it where every eight is kept and the sums of few chunks are merged by every block
  const int64_t of_thread = ceil_div(together.chunk, together.lanes);
  const int64_t kept = of_thread * kThreads * 8 * bytes_of(element) * tensors;
  return can && kept <= kept_bytes(device, second) ? Plan::cooperative : Plan::split;
}

// call(element, channels_last, vector) with the types and flags that a call's kernels are made for
template <class Call>
inline void with_kernels(Element element, const Shape& shape, bool vector, const Call& call) {
  const auto with_flags = [&](auto t) {
    if (shape.channels_last)
      vector ? call(t, Flag<true>{}, Flag<true>{}) : call(t, Flag<true>{}, Flag<false>{});
    else
      vector ? call(t, Flag<false>{}, Flag<true>{}) : call(t, Flag<false>{}, Flag<false>{});
  };
  if (element == Element::f32) return with_flags(float{});
  if (element == Element::bf16) return with_flags(bf16{});
  with_flags(fp16{});
}

inline void bn_act_forward(const ForwardArgs& a, Stream stream) {
  const Walk split = split_walk(a.shape);
  const bool vector = split.run % 8 == 0 && aligned(a.x) && aligned(a.residual) && aligned(a.y);
  const bool second = a.residual_kind == Residual::norm;
  const int trained = a.norm[0].training + (second && a.norm[1].training);
  const Plan plan =
      plan_of(a.plan, a.shape, a.element, a.device, second, trained ? 1 + second : 0, vector);
  with_kernels(a.element, a.shape, vector, [&](auto t, auto channels_last, auto vector) {
    using T = decltype(t);
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    constexpr bool kVector = decltype(vector)::value;
    if (plan == Plan::whole) {
      const Walk whole = whole_walk(a.shape);
      return launch("bn_act_fwd_whole", whole_forward_kernel<T, kChannelsLast, kVector>,
                    dim3(whole.blocks()), kThreads, stream, a, whole);
    }
    if constexpr (kVector) {
      if (plan == Plan::cooperative) {
        const Walk together = cooperative_walk(a.shape, a.device, second);
        const Kept<T> kept(kept_bytes(a.device, second), 1 + second,
                           a.norm[0].training + 2 * a.norm[1].training);
        const auto kernel = second ? cooperative_forward_kernel<T, kChannelsLast, true>
                                   : cooperative_forward_kernel<T, kChannelsLast, false>;
        const bool launched =
            launch_together("bn_act_fwd_cooperative", kernel, together.blocks(), kThreads,
                            kept.bytes(1 + second), stream, a, together, kept);
        if (launched) return;
      }
    }
    if (trained)
      launch("bn_act_fwd_statistics", statistics_kernel<T, kChannelsLast, kVector>,
             dim3(split.blocks(), trained), kThreads, stream, a, split);
    launch("bn_act_fwd_merge", merge_forward_kernel<T>,
           dim3(ceil_div(a.shape.channels, kMergeChannels)), kThreads, stream, a, split);
    // what reads element by element is slow anyway: one kernel for all kinds of residual
    const auto apply = second || !kVector ? apply_kernel<T, kChannelsLast, kVector, true>
                                          : apply_kernel<T, kChannelsLast, kVector, !kVector>;
    launch("bn_act_fwd_apply", apply, dim3(split.blocks()), kThreads, stream, a, split);
  });
}

// without a residual
inline void bn_act_reapply(const ForwardArgs& a, Stream stream) {
  const Walk split = split_walk(a.shape);
  const bool vector = split.run % 8 == 0 && aligned(a.x) && aligned(a.y) && aligned(a.stats);
  with_kernels(a.element, a.shape, vector, [&](auto t, auto channels_last, auto vector) {
    using T = decltype(t);
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    launch("bn_act_fwd_reapply", reapply_kernel<T, kChannelsLast, decltype(vector)::value>,
           dim3(split.blocks()), kThreads, stream, a, split);
  });
}

// Only the statistics of a.x: mean, sum of squared deviations and number of values, (3, C). Of `a`
// it takes element, shape, x, norm[0].training, which must be true, and scratch.
inline void bn_act_statistics(const ForwardArgs& a, double* out, Stream stream) {
  const Walk walk = split_walk(a.shape);
  const bool vector = walk.run % 8 == 0 && aligned(a.x);
  with_kernels(a.element, a.shape, vector, [&](auto t, auto channels_last, auto vector) {
    launch("bn_act_statistics",
           statistics_kernel<decltype(t), decltype(channels_last)::value, decltype(vector)::value>,
           dim3(walk.blocks()), kThreads, stream, a, walk);
  });
  launch("bn_act_statistics_merge", merge_statistics_kernel,
         dim3(ceil_div(a.shape.channels, kMergeChannels)), kThreads, stream, a, walk, out);
}

inline void bn_act_backward(const BackwardArgs& a, Stream stream) {
  if (!a.sums && !a.dx && !a.dresidual) return;
  const Walk split = split_walk(a.shape);
  const bool vector = split.run % 8 == 0 && aligned(a.dy) && aligned(a.x) && aligned(a.residual) &&
                      aligned(a.dx) && aligned(a.dresidual) && aligned(a.stats);
  const int tensors = 2 + a.residual_norm;
  const Plan plan = a.given ? Plan::split
                            : plan_of(a.plan, a.shape, a.element, a.device, a.residual_norm,
                                      a.sums ? tensors : 0, vector);
  with_kernels(a.element, a.shape, vector, [&](auto t, auto channels_last, auto vector) {
    using T = decltype(t);
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    constexpr bool kVector = decltype(vector)::value;
    if (plan == Plan::whole) {
      const Walk whole = whole_walk(a.shape);
      return launch("bn_act_bwd_whole", whole_backward_kernel<T, kChannelsLast, kVector>,
                    dim3(whole.blocks()), kThreads, stream, a, whole);
    }
    if constexpr (kVector) {
      if (plan == Plan::cooperative) {
        const Walk together = cooperative_walk(a.shape, a.device, a.residual_norm);
        const Kept<T> kept(kept_bytes(a.device, a.residual_norm), tensors, 7);
        const auto kernel = a.residual_norm ? cooperative_backward_kernel<T, kChannelsLast, true>
                                            : cooperative_backward_kernel<T, kChannelsLast, false>;
        const bool launched =
            launch_together("bn_act_bwd_cooperative", kernel, together.blocks(), kThreads,
                            kept.bytes(tensors), stream, a, together, kept);
        if (launched) return;
      }
    }
    const bool second = a.residual_norm || !kVector;
    if (a.sums) {
      const auto sums = second ? gradient_sums_kernel<T, kChannelsLast, kVector, true>
                               : gradient_sums_kernel<T, kChannelsLast, kVector, !kVector>;
      launch("bn_act_bwd_sums", sums, dim3(split.blocks()), kThreads, stream, a, split);
    }
    launch("bn_act_bwd_merge", merge_backward_kernel<T>,
           dim3(ceil_div(a.shape.channels, kMergeChannels)), kThreads, stream, a, split);
    if (!a.dx && !a.dresidual) return;
    const auto pass = second ? gradients_kernel<T, kChannelsLast, kVector, true>
                             : gradients_kernel<T, kChannelsLast, kVector, !kVector>;
    launch("bn_act_bwd_gradients", pass, dim3(split.blocks()), kThreads, stream, a, split);
  });
}

}  // namespace fused_res::cuda
