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

// How weights are read: row after row, or several rows at once, which the program prefetches, into the first-level cache
// or into the second. Which is fastest depends on the processor: calibration measures it.
enum Reading : int64_t { kRows, kTiles, kTilesThroughL2, kReadings };

// Bytes that each row of a tile is prefetched ahead.
template <Reading reading>
constexpr int64_t kAhead = reading == kTilesThroughL2 ? 2048 : 1024;

template <Reading reading>
HETEGEN_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, reading == kTilesThroughL2 ? 2 : 3);
}

constexpr int64_t kAheadOneRow = 4096;  // bytes that a row read by itself is prefetched ahead: the next page
constexpr int64_t kShortRow = 2048;     // bytes of a row up to which rows without gaps are read as one stream
constexpr int64_t kParallel = 1 << 16;  // multiply-adds from which further threads pay
constexpr int64_t kTogether = 64;       // columns whose sums are added up together
constexpr int64_t kMostSums = 1 << 22;  // of all blocks
constexpr int64_t kManySums = 1 << 17;  // sums of blocks from which further threads pay
constexpr int64_t kShares = 24;         // chunks for each thread: the last ones are waited for
constexpr int64_t kLeastPiece = 1024;   // bytes of a row that one thread reads, where rows are cut for more threads
constexpr int64_t kRowsAhead = 24;      // rows of a piece that a thread reads ahead: a multiple of every tile's

// kRowsOf*: rows of a tile, for one, two and up to four tokens at once. A row and token has a sum in a register, of
// which AVX2 has 16; and rows a power of two apart fall into the same set of a first-level cache, which has eight ways there.
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

// Items 0:count, handed out to the threads in chunks as each becomes free. What has been read ahead comes before: so many
// pieces of `each` items from the first one on, of which the threads have one after the other in turn.
class Items {
 public:
  Items(int64_t count, int64_t chunk, int64_t pieces = 0, int64_t each = 0)
      : count_(count), chunk_(chunk), pieces_(pieces), each_(each), own_(std::min(pieces * each, count)) {}
  // Of one thread: its items in order. The next one is taken before the work on one begins, so that it is known, while
  // there is at least one more for each thread; the last ones are for whoever is free.
  class Mine {
   public:
    explicit Mine(Items& all)
        : all_(all),
          ahead_(all.count_ - all.own_ - all.chunk_ * omp_get_num_threads()),
          piece_(omp_get_thread_num()) {}
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
      if (next_ >= end_ && (piece_ < all_.pieces_ || all_.taken_.load(std::memory_order_relaxed) < ahead_)) take();
      return item;
    }

   private:
    void take() {
      if (piece_ < all_.pieces_) {
        next_ = std::min(piece_ * all_.each_, all_.own_);
        end_ = std::min(next_ + all_.each_, all_.own_);
        piece_ += omp_get_num_threads();
      } else {
        next_ = all_.own_ + all_.taken_.fetch_add(all_.chunk_, std::memory_order_relaxed);
        end_ = std::min(next_ + all_.chunk_, all_.count_);
      }
    }
    Items& all_;
    const int64_t ahead_;
    int64_t next_ = 0, end_ = 0, piece_;
  };

 private:
  const int64_t count_, chunk_, pieces_, each_, own_;
  std::atomic<int64_t> taken_{0};
};

// Adds columns from:to of x[m, k] * w[r, k] to the sums, U steps at a time; returns where it ends. With `fetch` what
// lies at `ahead` as the rows do at w is prefetched.
template <typename T, Reading reading, int M, int R, int U, bool fetch>
HETEGEN_INLINE int64_t dot_columns(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t ldw, const T* ahead, Vec (&sum)[U][R][M],
    int64_t from, int64_t to) {
  using O = DotOps<T>;
  int64_t i = from;
  for (; i + U * O::step <= to; i += U * O::step) {
    HETEGEN_UNROLL for (int u = 0; u < U; ++u) {
      HETEGEN_UNROLL for (int r = 0; r < R; ++r) {
        const int64_t place = r * ldw + i + u * O::step;
        if constexpr (fetch) prefetch<reading>(ahead + place);
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
template <typename T, Reading reading, int M, int R, int U>
HETEGEN_INLINE void dot_tile(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t ldw, const T* then, const T* bias, T* out,
    int64_t ldo, int64_t k) {
  // One row and one token is a pure stream, which some hardware prefetches best when left alone, except where it jumps.
  constexpr bool stream = R == 1 && M == 1;
  constexpr int64_t most = (R > 1 ? kAhead<reading> : kAheadOneRow) / int64_t(sizeof(T));
  const int64_t ahead = std::min(k, most);
  Vec sum[U][R][M];
  HETEGEN_UNROLL for (int u = 0; u < U; ++u) {
    HETEGEN_UNROLL for (int r = 0; r < R; ++r) {
      HETEGEN_UNROLL for (int m = 0; m < M; ++m) sum[u][r][m] = Vec(0.f);
    }
  }
  int64_t i = 0;
  if (!stream || then != nullptr) {
    i = dot_columns<T, reading, M, R, U, !stream>(x, ldx, w, ldw, w + most, sum, 0, k - ahead);
    if (then != nullptr) i = dot_columns<T, reading, M, R, U, true>(x, ldx, w, ldw, then + ahead - k, sum, i, k);
  }
  i = dot_columns<T, reading, M, R, U, false>(x, ldx, w, ldw, nullptr, sum, i, k);
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

// All tokens with R rows, `fixed` of them if that is not 0; from the second block of tokens on the rows come from a
// cache.
template <typename T, Reading reading, int R, int U, int fixed>
HETEGEN_INLINE void dot_rows(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t ldw, const T* then, const T* bias, T* out,
    int64_t ldo, int64_t m, int64_t k) {
  if constexpr (fixed != 0) return dot_tile<T, reading, fixed, R, U>(x, ldx, w, ldw, then, bias, out, ldo, k);
  for (; m >= 4; m -= 4, x += 4 * ldx, out += 4 * ldo) {
    dot_tile<T, reading, 4, R, 1>(x, ldx, w, ldw, then, bias, out, ldo, k);
  }
  if (m == 3) dot_tile<T, reading, 3, R, 1>(x, ldx, w, ldw, then, bias, out, ldo, k);
  if (m == 2) dot_tile<T, reading, 2, R, U>(x, ldx, w, ldw, then, bias, out, ldo, k);
  if (m == 1) dot_tile<T, reading, 1, R, U>(x, ldx, w, ldw, then, bias, out, ldo, k);
}

// Tokens x[m, k] for a matrix w[n, k] of their own, and their results out[m, n].
template <typename T>
struct Group {
  const typename DotOps<T>::X* x;
  const T* w;
  T* out;
  int64_t m;
};

template <typename T>
using Groups = std::vector<Group<T>>;

template <typename T>
int64_t count_tokens(const Groups<T>& groups) {
  int64_t total = 0;
  for (const Group<T>& group : groups) total += group.m;
  return total;
}

// Tiles of R rows of all groups are shared out among the threads. The end of each prefetches the beginning of the
// thread's next one. With `fixed` each group has so many tokens. The rows that fill no tile are computed one by one.
// The first `pieces` of kRowsAhead rows have been read ahead: the threads that did compute them.
template <typename T, Reading reading, int R, int U, int fixed = 0>
void dot_linear(
    const Groups<T>& groups, int64_t ldx, int64_t ldw, const T* bias, int64_t n, int64_t k, int64_t pieces) {
  static_assert(kRowsAhead % R == 0);
  const int64_t tiles = n / R, count = tiles * int64_t(groups.size()), tokens = count_tokens(groups);
  const bool stream = R == 1 && tokens == int64_t(groups.size());
  const bool follows_itself = stream && ldw == k;  // rows without gaps are one stream
  Items items(count, std::max<int64_t>(1, count / (kShares * omp_get_max_threads())), pieces, kRowsAhead / R);
#pragma omp parallel if (tokens * n * k >= kParallel)
  for (Items::Mine mine(items); mine.more();) {
    const int64_t item = mine.pop(), r = item % tiles * R;
    const Group<T>& own = groups[item / tiles];
    const T* then = nullptr;
    if (mine.next_is_known() && !follows_itself) {
      then = groups[mine.next() / tiles].w + mine.next() % tiles * R * ldw;
    }
    dot_rows<T, reading, R, U, fixed>(
        own.x, ldx, own.w + r * ldw, ldw, then, bias ? bias + r : nullptr, own.out + r, n, own.m, k);
  }
  for (const Group<T>& own : groups) {
    for (int64_t r = tiles * R; r < n; ++r) {
      dot_rows<T, kRows, 1, U, fixed>(
          own.x, ldx, own.w + r * ldw, ldw, nullptr, bias ? bias + r : nullptr, own.out + r, n, own.m, k);
    }
  }
}

// For one or two tokens rows are read one after the other, which is what hardware prefetchers follow best; more tokens
// want tiles of rows, so that an activation that is loaded is used several times. With `reading` in tiles one and two
// tokens have them, too: that keeps more of the rows under way where a core waits for its memory. Not with short rows
// and one token: a tile ends before what is prefetched for it has come.
template <typename T, Reading reading>
void linear(
    const Groups<T>& groups, int64_t ldx, int64_t ldw, const T* bias, int64_t n, int64_t k, int64_t pieces = 0) {
  const auto [least, most] = std::minmax_element(
      groups.begin(), groups.end(), [](const Group<T>& a, const Group<T>& b) { return a.m < b.m; });
  if (least == groups.end()) return;
  constexpr Reading in_tiles = reading == kRows ? kTiles : reading;
  const bool short_rows = ldw == k && k * int64_t(sizeof(T)) <= kShortRow;
  const int64_t in_rows = reading == kRows ? 2 : short_rows ? 1 : 0;  // up to so many tokens
  if (most->m <= in_rows) {
    dot_linear<T, kRows, 1, 4>(groups, ldx, ldw, bias, n, k, pieces);
  } else if (least->m == 1 && most->m == 1) {
    dot_linear<T, in_tiles, kRowsOfOne, 1, 1>(groups, ldx, ldw, bias, n, k, pieces);
  } else if (least->m == 2 && most->m == 2) {
    dot_linear<T, in_tiles, kRowsOfTwo, 1, 2>(groups, ldx, ldw, bias, n, k, pieces);
  } else {
    dot_linear<T, in_tiles, kRowsOfFour, 1>(groups, ldx, ldw, bias, n, k, pieces);
  }
}

// Consecutive tokens of x[m, k] for each of the matrices w[count, n, k], `stride` elements apart: those up to ends[i]
// that come before none of the earlier ones are matrix i's.
template <typename T, Reading reading>
void grouped_linear(
    const typename DotOps<T>::X* x, int64_t ldx, const T* w, int64_t stride, int64_t ldw, const int32_t* ends,
    int64_t count, T* out, int64_t n, int64_t k) {
  Groups<T> groups;
  int64_t start = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (ends[i] > start) groups.push_back({x + start * ldx, w + i * stride, out + start * n, ends[i] - start});
    start = ends[i];
  }
  linear<T, reading>(groups, ldx, ldw, nullptr, n, k);
}

}  // namespace

// EXPORT(name, type, prefix, reading) of everything that there is.
#define HETEGEN_EXPORT_READING(EXPORT, PREFIX, READING) \
  EXPORT(float32, float, PREFIX, READING)               \
  EXPORT(bfloat16, c10::BFloat16, PREFIX, READING)      \
  EXPORT(float16, c10::Half, PREFIX, READING)
#define HETEGEN_EXPORT_ALL(EXPORT)               \
  HETEGEN_EXPORT_READING(EXPORT, rows, kRows)    \
  HETEGEN_EXPORT_READING(EXPORT, tiles, kTiles)  \
  HETEGEN_EXPORT_READING(EXPORT, tiles_through_l2, kTilesThroughL2)

#define HETEGEN_EXPORT_LINEAR(NAME, T, PREFIX, READING)                                                          \
  extern "C" void PREFIX##_linear_##NAME(                                                                        \
      const void* x, int64_t ldx, const void* w, int64_t ldw, const void* bias, void* out, int64_t m, int64_t n, \
      int64_t k) {                                                                                               \
    linear<T, READING>({{(const DotOps<T>::X*)x, (const T*)w, (T*)out, m}}, ldx, ldw, (const T*)bias, n, k);     \
  }                                                                                                              \
  extern "C" void PREFIX##_grouped_linear_##NAME(                                                                \
      const void* x, int64_t ldx, const void* w, int64_t stride, int64_t ldw, const void* ends, int64_t count,   \
      void* out, int64_t n, int64_t k) {                                                                         \
    grouped_linear<T, READING>(                                                                                  \
        (const DotOps<T>::X*)x, ldx, (const T*)w, stride, ldw, (const int32_t*)ends, count, (T*)out, n, k);      \
  }

HETEGEN_EXPORT_ALL(HETEGEN_EXPORT_LINEAR)

// Whether whole and grouped Linears of bfloat16 take their activations in bfloat16 (else in float32).
extern "C" int64_t bfloat16_dot() {
  return HETEGEN_BFLOAT16_DOT;
}
