// Linears on few tokens, at the speed of reading the weights: each weight is loaded once from main memory.
//
// Products are summed in float32. Elements are float32, bfloat16 or float16; the activations come as Ops<T>::X.
// at::vec gives the vectors of the processor that this is compiled for (AVX2, AVX-512, NEON, ...).

#include <ATen/cpu/vec/functional.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#define HETEGEN_INLINE inline __attribute__((always_inline))
#define HETEGEN_UNROLL _Pragma("GCC unroll 8")

#ifdef __linux__
#include <sched.h>
#include <unistd.h>
#endif

namespace {

// Of the process's first thread; the calling thread may be bound to fewer.
int64_t count_processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(getpid(), sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return omp_get_num_procs();
}
const int64_t kProcessors = count_processors();  // counted once: who makes room and who computes have to agree

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kAhead = 1024;        // bytes that each row of a tile is prefetched ahead
constexpr int64_t kAheadOneRow = 4096;  // the same where rows are read one after the other: the next page
constexpr int64_t kParallel = 1 << 16;  // multiply-adds from which further threads pay
constexpr int64_t kTogether = 64;       // columns whose sums are added up together
constexpr int64_t kMostSums = 1 << 22;  // of all blocks
constexpr int64_t kManySums = 1 << 17;  // sums of blocks from which further threads pay
constexpr int64_t kShares = 24;         // chunks for each thread: the last ones are waited for
constexpr int64_t kLeastPiece = 1024;   // bytes of a row that one thread reads, where rows are cut for more threads

// kRowsOf*: rows of a tile, for one, two and up to four tokens at once. A row and token has a sum in a register, of which
// AVX2 has 16; and rows a power of two apart fall into the same set of a first-level cache, which has eight ways there.
// load_wide: two vectors of 16-bit elements as float32. ATen loads both halves as one and takes them apart again, which
// costs more than the rest of a product where a processor has no instruction for such elements.
constexpr int kRowsOfTwo = 4;
#if defined(CPU_CAPABILITY_AVX2)
constexpr int kRowsOfOne = 4, kRowsOfFour = 3;
HETEGEN_INLINE __m128i half_of(const void* p, int half) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p) + half);
}
HETEGEN_INLINE void load_wide(const c10::BFloat16* p, Vec& first, Vec& second) {
  first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_of(p, 0)), 16));
  second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_of(p, 1)), 16));
}
HETEGEN_INLINE void load_wide(const c10::Half* p, Vec& first, Vec& second) {
  first = _mm256_cvtph_ps(half_of(p, 0));
  second = _mm256_cvtph_ps(half_of(p, 1));
}
#else
constexpr int kRowsOfOne = 8, kRowsOfFour = 6;
template <typename T>
HETEGEN_INLINE void load_wide(const T* p, Vec& first, Vec& second) {
  at::vec::load_to_float<T>(p, first, second);
}
#endif

// Elements of T, `step` at a time: as float32 vectors.
template <typename T>
struct Ops {
  using X = float;
  static constexpr int64_t step = at::vec::Vectorized<T>::size();
  static constexpr int count = step / Vec::size();
  struct Elements {
    Vec part[count];
  };
  static HETEGEN_INLINE Elements load(const T* p) {
    Elements e;
    if constexpr (count == 1) {
      e.part[0] = Vec::loadu(p);
    } else {
      load_wide(p, e.part[0], e.part[1]);
    }
    return e;
  }
  static HETEGEN_INLINE Vec dot(const Elements& e, const X* x, Vec sum) {
    HETEGEN_UNROLL for (int i = 0; i < count; ++i) {
      sum = at::vec::fmadd(e.part[i], Vec::loadu(x + i * Vec::size()), sum);
    }
    return sum;
  }
};

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
#define HETEGEN_BFLOAT16_DOT 1
// Elements of the rows, and of the activations, multiplied as they are.
struct Bfloat16Dot {
  using X = c10::BFloat16;
  static constexpr int64_t step = 32;
  using Elements = __m512i;
  static HETEGEN_INLINE Elements load(const c10::BFloat16* p) {
    return _mm512_loadu_si512(p);
  }
  static HETEGEN_INLINE Vec dot(const Elements& e, const X* x, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)e, (__m512bh)_mm512_loadu_si512(x));
  }
};
#else
#define HETEGEN_BFLOAT16_DOT 0
#endif

template <typename T>
struct DotOps : Ops<T> {};
#if HETEGEN_BFLOAT16_DOT
template <>
struct DotOps<c10::BFloat16> : Bfloat16Dot {};
#endif

// Items 0:count, handed out to the threads in chunks as each becomes free.
class Items {
 public:
  Items(int64_t count, int64_t chunk) : count_(count), chunk_(chunk) {}
  // Of one thread: its items in order. The next one is taken before the work on one begins, so that it is known, while
  // there is at least one more for each thread; the last ones are for whoever is free.
  class Mine {
   public:
    explicit Mine(Items& all) : all_(all), ahead_(all.count_ - all.chunk_ * omp_get_num_threads()) {}
    bool more() {
      if (next_ >= end_) take();
      return next_ < end_;
    }
    bool next_is_known() const {
      return next_ < end_;
    }
    int64_t next() const {
      return next_;
    }
    int64_t pop() {
      const int64_t item = next_++;
      if (next_ >= end_ && all_.taken_.load(std::memory_order_relaxed) < ahead_) take();
      return item;
    }

   private:
    void take() {
      next_ = all_.taken_.fetch_add(all_.chunk_, std::memory_order_relaxed);
      end_ = std::min(next_ + all_.chunk_, all_.count_);
    }
    Items& all_;
    const int64_t ahead_;
    int64_t next_ = 0, end_ = 0;
  };

 private:
  const int64_t count_, chunk_;
  std::atomic<int64_t> taken_{0};
};

// Adds columns from:to of x[m, k] * w[r, k] to the sums, U steps at a time; returns where it ends. With `prefetch` what lies
// at `ahead` as the rows do at w is prefetched.
template <typename T, int M, int R, int U, bool prefetch>
HETEGEN_INLINE int64_t dot_columns(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t ldw, const T* ahead, Vec (&sum)[U][R][M],
    int64_t from, int64_t to) {
  using O = DotOps<T>;
  int64_t i = from;
  for (; i + U * O::step <= to; i += U * O::step) {
    HETEGEN_UNROLL for (int u = 0; u < U; ++u) {
      HETEGEN_UNROLL for (int r = 0; r < R; ++r) {
        const int64_t place = r * ldw + i + u * O::step;
        if constexpr (prefetch) __builtin_prefetch(ahead + place);
        const auto elements = O::load(w + place);
        HETEGEN_UNROLL for (int m = 0; m < M; ++m) {
          sum[u][r][m] = O::dot(elements, x + m * ldx + i + u * O::step, sum[u][r][m]);
        }
      }
    }
  }
  return i;
}

// out[m, r] = sum over k of x[m, k] * w[r, k] (+ bias[r]) for M tokens and R rows, U steps at a time. The last columns
// prefetch the first ones of the rows that follow, `then`, if it is not null.
template <typename T, int M, int R, int U>
HETEGEN_INLINE void dot_tile(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t ldw, const T* then, const T* bias, T* out,
    int64_t ldo, int64_t k) {
  // One row and one token is a pure stream, which some hardware prefetches best when left alone, except where it jumps.
  constexpr bool stream = R == 1 && M == 1;
  constexpr int64_t most = (R > 1 ? kAhead : kAheadOneRow) / int64_t(sizeof(T));
  const int64_t ahead = std::min(k, most);
  Vec sum[U][R][M];
  HETEGEN_UNROLL for (int u = 0; u < U; ++u) {
    HETEGEN_UNROLL for (int r = 0; r < R; ++r) {
      HETEGEN_UNROLL for (int m = 0; m < M; ++m) sum[u][r][m] = Vec(0.f);
    }
  }
  int64_t i = 0;
  if (!stream || then != nullptr) {
    i = dot_columns<T, M, R, U, !stream>(x, ldx, w, ldw, w + most, sum, 0, k - ahead);
    if (then != nullptr) i = dot_columns<T, M, R, U, true>(x, ldx, w, ldw, then + ahead - k, sum, i, k);
  }
  i = dot_columns<T, M, R, U, false>(x, ldx, w, ldw, nullptr, sum, i, k);
  HETEGEN_UNROLL for (int r = 0; r < R; ++r) {
    HETEGEN_UNROLL for (int m = 0; m < M; ++m) {
      Vec total = sum[0][r][m];
      HETEGEN_UNROLL for (int u = 1; u < U; ++u) total = total + sum[u][r][m];
      float result = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, total);
      for (int64_t j = i; j < k; ++j) result += float(w[r * ldw + j]) * float(x[m * ldx + j]);
      out[m * ldo + r] = T(result + (bias ? float(bias[r]) : 0.f));
    }
  }
}

// All tokens with R rows, `fixed` of them if that is not 0; from the second block of tokens on the rows come from the
// first-level cache.
template <typename T, int R, int U, int fixed>
HETEGEN_INLINE void dot_rows(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t ldw, const T* then, const T* bias, T* out,
    int64_t ldo, int64_t m, int64_t k) {
  if constexpr (fixed != 0) return dot_tile<T, fixed, R, U>(x, ldx, w, ldw, then, bias, out, ldo, k);
  for (; m >= 4; m -= 4, x += 4 * ldx, out += 4 * ldo) dot_tile<T, 4, R, 1>(x, ldx, w, ldw, then, bias, out, ldo, k);
  if (m == 3) dot_tile<T, 3, R, 1>(x, ldx, w, ldw, then, bias, out, ldo, k);
  if (m == 2) dot_tile<T, 2, R, U>(x, ldx, w, ldw, then, bias, out, ldo, k);
  if (m == 1) dot_tile<T, 1, R, U>(x, ldx, w, ldw, then, bias, out, ldo, k);
}

// Tiles of R rows are shared out among the threads. The end of each prefetches the beginning of the thread's next one.
template <typename T, int R, int U, int fixed = 0>
void dot_linear(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* out, int64_t m,
    int64_t n, int64_t k) {
  const int64_t tiles = n / R;
  const bool follows_itself = R == 1 && m == 1 && ldw == k;  // rows without gaps are one stream
  Items items(tiles, std::max<int64_t>(1, tiles / (kShares * omp_get_max_threads())));
#pragma omp parallel if (m * n * k >= kParallel)
  for (Items::Mine mine(items); mine.more();) {
    const int64_t r = mine.pop() * R;
    const T* then = mine.next_is_known() && !follows_itself ? w + mine.next() * R * ldw : nullptr;
    dot_rows<T, R, U, fixed>(x, ldx, w + r * ldw, ldw, then, bias ? bias + r : nullptr, out + r, n, m, k);
  }
  for (int64_t r = tiles * R; r < n; ++r) {
    dot_rows<T, 1, U, fixed>(x, ldx, w + r * ldw, ldw, nullptr, bias ? bias + r : nullptr, out + r, n, m, k);
  }
}

// One or two tokens read row after row, which is what hardware prefetchers follow best; more tokens want
// tiles of rows, so that an activation that is loaded is used several times. With `tiled` one and two tokens have tiles,
// too: several rows at once and prefetches by the program keep more of them under way where a core waits for its memory.
template <typename T, bool tiled>
void linear(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* out, int64_t m,
    int64_t n, int64_t k) {
  if (tiled && m == 1) {
    dot_linear<T, kRowsOfOne, 1, 1>(x, ldx, w, ldw, bias, out, m, n, k);
  } else if (tiled && m == 2) {
    dot_linear<T, kRowsOfTwo, 1, 2>(x, ldx, w, ldw, bias, out, m, n, k);
  } else if (m <= 2) {
    dot_linear<T, 1, 4>(x, ldx, w, ldw, bias, out, m, n, k);
  } else {
    dot_linear<T, kRowsOfFour, 1>(x, ldx, w, ldw, bias, out, m, n, k);
  }
}

// sums[m, j] += sum over R rows of x[m, r] * w[r, j] for whole steps of columns from:to; returns where it ends. `ahead` and
// `prefetch` as for dot_columns.
template <typename T, int M, int R, bool prefetch>
HETEGEN_INLINE int64_t axpy_columns(
    const float* x, int64_t ldx, const T* w, int64_t ldw, const T* ahead, float* sums, int64_t lds, int64_t from,
    int64_t to) {
  using O = Ops<T>;
  int64_t j = from;
  for (; j + O::step <= to; j += O::step) {
    Vec sum[M][O::count];
    HETEGEN_UNROLL for (int m = 0; m < M; ++m) {
      HETEGEN_UNROLL for (int c = 0; c < O::count; ++c) sum[m][c] = Vec::loadu(sums + m * lds + j + c * Vec::size());
    }
    HETEGEN_UNROLL for (int r = 0; r < R; ++r) {
      if constexpr (prefetch) __builtin_prefetch(ahead + r * ldw + j);
      const auto elements = O::load(w + r * ldw + j);
      HETEGEN_UNROLL for (int m = 0; m < M; ++m) {
        HETEGEN_UNROLL for (int c = 0; c < O::count; ++c) {
          sum[m][c] = at::vec::fmadd(elements.part[c], Vec(x[m * ldx + r]), sum[m][c]);
        }
      }
    }
    HETEGEN_UNROLL for (int m = 0; m < M; ++m) {
      HETEGEN_UNROLL for (int c = 0; c < O::count; ++c) sum[m][c].store(sums + m * lds + j + c * Vec::size());
    }
  }
  return j;
}

// The same for all n columns. With `ahead` the program prefetches, at the end the beginning of the rows that follow,
// `then`, if it is not null.
template <typename T, int M, int R, bool ahead>
HETEGEN_INLINE void axpy_rows(
    const float* x, int64_t ldx, const T* w, int64_t ldw, const T* then, float* sums, int64_t lds, int64_t n) {
  constexpr int64_t most = kAhead / int64_t(sizeof(T));
  const int64_t distance = std::min(n, most);
  int64_t j = 0;
  if constexpr (ahead) {
    j = axpy_columns<T, M, R, true>(x, ldx, w, ldw, w + most, sums, lds, 0, n - distance);
    if (then != nullptr) j = axpy_columns<T, M, R, true>(x, ldx, w, ldw, then + distance - n, sums, lds, j, n);
  }
  j = axpy_columns<T, M, R, false>(x, ldx, w, ldw, nullptr, sums, lds, j, n);
  for (; j < n; ++j) {
    for (int m = 0; m < M; ++m) {
      for (int r = 0; r < R; ++r) sums[m * lds + j] += x[m * ldx + r] * float(w[r * ldw + j]);
    }
  }
}

// R rows for all tokens; from the second group of tokens on the rows come from a cache.
template <typename T, int R, bool ahead>
HETEGEN_INLINE void axpy_tokens(
    const float* x, int64_t ldx, const T* w, int64_t ldw, const T* then, float* sums, int64_t lds, int64_t m,
    int64_t n) {
  int64_t i = 0;
  if (m >= 4) {
    axpy_rows<T, 4, R, ahead>(x, ldx, w, ldw, then, sums, lds, n);
    for (i = 4; i + 4 <= m; i += 4) axpy_rows<T, 4, R, false>(x + i * ldx, ldx, w, ldw, nullptr, sums + i * lds, lds, n);
  } else if (m >= 2) {
    axpy_rows<T, 2, R, ahead>(x, ldx, w, ldw, then, sums, lds, n);
    i = 2;
  } else {
    axpy_rows<T, 1, R, ahead>(x, ldx, w, ldw, then, sums, lds, n);
    i = 1;
  }
  for (; i < m; ++i) axpy_rows<T, 1, R, false>(x + i * ldx, ldx, w, ldw, nullptr, sums + i * lds, lds, n);
}

// The rows of a partial Linear are cut into blocks, each with sums of its own, which are added up in their order: so the
// result is the same bits whichever thread computes which block, and however many there are. Each block has a share
// of the rows that are left, so that the last ones, which threads wait for, are small.
struct RowBlocks {
  int64_t least;
  RowBlocks(int64_t m, int64_t n, int64_t k)
      : least(m * n * k < kParallel ? k : groups(std::max(kLeastRows * m, (k + most(m * n) - 1) / most(m * n)))) {}
  static int64_t groups(int64_t rows) {
    return (rows + kGroup - 1) / kGroup * kGroup;
  }
  // Blocks whose sums, so many each, have room.
  static int64_t most(int64_t sums) {
    return std::max<int64_t>(1, kMostSums / sums);
  }
  // Rows of the next block where so many are left: whole groups, or all.
  int64_t rows(int64_t left) const {
    return std::min(left, std::max(least, groups(left / (2 * kProcessors))));
  }
  std::vector<int64_t> starts(int64_t k) const {
    std::vector<int64_t> found{0};
    do found.push_back(found.back() + rows(k - found.back())); while (found.back() < k);
    return found;
  }
  static constexpr int64_t kGroup = 8, kLeastRows = 16;
};

// The sums of a block of rows of all tokens, R rows at once, in n columns. `next` is where what the thread reads after
// it begins.
template <typename T, int R, bool ahead>
void partial_sums(
    const float* x, int64_t ldx, const T* w, int64_t ldw, const T* next, float* sums, int64_t lds, int64_t m, int64_t n,
    int64_t rows) {
  for (int64_t i = 0; i < m; ++i) std::fill_n(sums + i * lds, n, 0.f);
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    const T* then = r + 2 * R <= rows ? w + (r + R) * ldw : next;
    axpy_tokens<T, R, ahead>(x + r, ldx, w + r * ldw, ldw, then, sums, lds, m, n);
  }
  for (; r < rows; ++r) axpy_tokens<T, 1, ahead>(x + r, ldx, w + r * ldw, ldw, nullptr, sums, lds, m, n);
}

// Columns of each of so many pieces of n: a multiple of kTogether.
inline int64_t piece_width(int64_t n, int64_t pieces) {
  const int64_t most = pieces * kTogether;
  return (n + most - 1) / most * kTogether;
}

// out[m, j] = sum over k rows of x[m, k] * w[k, j] (+ bias[j]); `sums` is [blocks, m, n] of float32 to work in.
// With `tiled` the program prefetches the rows. Where there are fewer blocks than threads are kept busy with (many tokens,
// whose sums are large), each is cut into pieces of the columns.
template <typename T, bool tiled>
void partial_linear(
    const float* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* out, float* sums, int64_t m, int64_t n,
    int64_t k) {
  if (m == 0 || n == 0) return;
  const std::vector<int64_t> starts = RowBlocks(m, n, k).starts(k);
  const int64_t blocks = int64_t(starts.size()) - 1;
  const bool parallel = m * n * k >= kParallel;
  const int64_t wanted = parallel ? (m == 1 ? 2 : 4) * omp_get_max_threads() : 1;
  const int64_t most = std::max<int64_t>(1, n * int64_t(sizeof(T)) / kLeastPiece);
  const int64_t width = piece_width(n, std::min(most, (wanted + blocks - 1) / blocks));
  const int64_t pieces = (n + width - 1) / width;
  Items items(blocks * pieces, 1);
#pragma omp parallel if (parallel && blocks * pieces > 1)
  for (Items::Mine mine(items); mine.more();) {
    const int64_t item = mine.pop(), b = item / pieces, lo = item % pieces * width;
    const int64_t r = starts[b], rows = starts[b + 1] - r, columns = std::min(width, n - lo);
    const int64_t then = mine.next();
    const T* next = mine.next_is_known() ? w + starts[then / pieces] * ldw + then % pieces * width : nullptr;
    float* own = sums + b * m * n + lo;
    if (m == 1) {
      partial_sums<T, 8, tiled>(x + r, ldx, w + r * ldw + lo, ldw, next, own, n, m, columns, rows);
    } else {
      partial_sums<T, 4, tiled>(x + r, ldx, w + r * ldw + lo, ldw, next, own, n, m, columns, rows);
    }
  }
#pragma omp parallel for if (blocks * m * n >= kManySums)
  for (int64_t lo = 0; lo < n; lo += kTogether) {
    const int64_t columns = std::min(kTogether, n - lo);
    for (int64_t i = 0; i < m; ++i) {
      float* total = sums + i * n + lo;
      for (int64_t b = 1; b < blocks; ++b) {
        for (int64_t j = 0; j < columns; ++j) total[j] += total[b * m * n + j];
      }
      for (int64_t j = 0; j < columns; ++j) out[i * n + lo + j] = T(total[j] + (bias ? float(bias[lo + j]) : 0.f));
    }
  }
}

}  // namespace

#define HETEGEN_EXPORT(NAME, T)                                                                                \
  extern "C" void linear_##NAME(                                                                               \
      const void* x, int64_t ldx, const void* w, int64_t ldw, const void* bias, void* out, int64_t m, int64_t n, \
      int64_t k) {                                                                                             \
    linear<T, false>((const DotOps<T>::X*)x, ldx, (const T*)w, ldw, (const T*)bias, (T*)out, m, n, k);         \
  }                                                                                                            \
  extern "C" void tiled_linear_##NAME(                                                                         \
      const void* x, int64_t ldx, const void* w, int64_t ldw, const void* bias, void* out, int64_t m, int64_t n, \
      int64_t k) {                                                                                             \
    linear<T, true>((const DotOps<T>::X*)x, ldx, (const T*)w, ldw, (const T*)bias, (T*)out, m, n, k);          \
  }                                                                                                            \
  extern "C" void partial_linear_##NAME(                                                                       \
      const void* x, int64_t ldx, const void* w, int64_t ldw, const void* bias, void* out, void* sums, int64_t m, \
      int64_t n, int64_t k) {                                                                                  \
    partial_linear<T, false>((const float*)x, ldx, (const T*)w, ldw, (const T*)bias, (T*)out, (float*)sums, m, n, k); \
  }                                                                                                            \
  extern "C" void tiled_partial_linear_##NAME(                                                                 \
      const void* x, int64_t ldx, const void* w, int64_t ldw, const void* bias, void* out, void* sums, int64_t m, \
      int64_t n, int64_t k) {                                                                                  \
    partial_linear<T, true>((const float*)x, ldx, (const T*)w, ldw, (const T*)bias, (T*)out, (float*)sums, m, n, k); \
  }

HETEGEN_EXPORT(float32, float)
HETEGEN_EXPORT(bfloat16, c10::BFloat16)
HETEGEN_EXPORT(float16, c10::Half)

// Blocks of a partial Linear, which is given sums for each.
extern "C" int64_t partial_blocks(int64_t m, int64_t n, int64_t k) {
  return int64_t(RowBlocks(m, n, k).starts(k).size()) - 1;
}

// Whether linear_bfloat16 takes its activations in bfloat16 (else in float32).
extern "C" int64_t bfloat16_dot() {
  return HETEGEN_BFLOAT16_DOT;
}
