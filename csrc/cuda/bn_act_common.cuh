// bn_act on a CUDA device, on raw pointers: the part that forward (bn_act_forward.cuh) and backward
// (bn_act_backward.cuh) share. It cuts up the work, loads and stores elements, and sums over a
// block. A pass is bound by memory, so each element is read and written once, 16 bytes at a time
// with several accesses in flight. Compiles with a host compiler too (platform.cuh).
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

// The resources of a device, for cooperative launches.
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
constexpr int kMergeChannels = 8;  // of a block of the merge kernels: 64 bytes of doubles
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

// A thread's work: every `lanes`-th item of [first, end) of one column.
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

// A sum of floats: rounded, and what rounding it has lost until now. Knuth's two-sum finds a loss
// exactly, whichever of its operands is larger (Ogita, Rump and Oishi, 2005). As good as a sum in
// double, of which most GPUs make few.
struct Sum {
  float high = 0, low = 0;

  __device__ __forceinline__ void add(float value) {
    const float total = plus(high, value), rest = plus(total, -high);
    low = plus(low, plus(plus(high, -plus(total, -rest)), plus(value, -rest)));
    high = total;
  }
  __device__ __forceinline__ Sum operator+(const Sum& other) const {
    Sum both = *this;
    both.add(other.high);
    both.low = plus(both.low, other.low);
    return both;
  }
  // where high is infinite or NaN, low is NaN and high is the sum
  __device__ double value() const { return low == low ? (double)high + low : high; }
};

constexpr int kReduced = 8;         // values a thread adds up at a time
__device__ inline auto reduced() {  // one array for all instances of reduce: of Sum or double
  SHARED(uint64_t, sums, kReduced* kThreads);
  return sums;
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy((void*)&to, &from, sizeof to);
  return to;
}

// Adds up `values` of the `lanes` threads of each column, thread t being lane t / width of column
// t % width, in a fixed order. Every thread gets its column's totals.
template <class Value, int kValues>
__device__ inline void reduce(Value (&values)[kValues], int width) {
  constexpr int kAtOnce = kValues < kReduced ? kValues : kReduced;
  static_assert(kValues % kAtOnce == 0);
  const auto sums = reduced();
  const int t = threadIdx.x;
#pragma unroll
  for (int first = 0; first < kValues; first += kAtOnce) {
    __syncthreads();  // the last totals have been read
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) sums[k * kThreads + t] = bits_as<uint64_t>(values[first + k]);
    for (int half = kThreads / 2; half >= width; half /= 2) {
      SYNC_BEFORE_REDUCTION();
      if (t < half)
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
          const uint64_t mine = sums[k * kThreads + t], other = sums[k * kThreads + t + half];
          sums[k * kThreads + t] = bits_as<uint64_t>(bits_as<Value>(mine) + bits_as<Value>(other));
        }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kAtOnce; k++)
      values[first + k] = bits_as<Value>((uint64_t)sums[k * kThreads + t % width]);
  }
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

}  // namespace fused_res::cuda
