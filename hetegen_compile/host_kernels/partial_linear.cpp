// Partial Linears on few tokens: the sum over some rows of a weight [in, out], each read once, in float32.
//
// Built behind linear.cpp, whose vectors, elements and items it uses.

namespace {

// sums[m, j] += sum over R rows of x[m, r] * w[r, j] for whole steps of columns from:to; returns where it ends. `ahead`
// and `fetch` as for dot_columns.
template <typename T, Reading reading, int M, int R, bool fetch>
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
      if constexpr (fetch) prefetch<reading>(ahead + r * ldw + j);
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

// The same for all n columns. With `reading` in tiles the program prefetches, at the end the beginning of the rows that
// follow, `then`, if it is not null.
template <typename T, Reading reading, int M, int R>
HETEGEN_INLINE void axpy_rows(
    const float* x, int64_t ldx, const T* w, int64_t ldw, const T* then, float* sums, int64_t lds, int64_t n) {
  constexpr int64_t most = kAhead<reading> / int64_t(sizeof(T));
  const int64_t distance = std::min(n, most);
  int64_t j = 0;
  if constexpr (reading != kRows) {
    j = axpy_columns<T, reading, M, R, true>(x, ldx, w, ldw, w + most, sums, lds, 0, n - distance);
    if (then != nullptr) j = axpy_columns<T, reading, M, R, true>(x, ldx, w, ldw, then + distance - n, sums, lds, j, n);
  }
  j = axpy_columns<T, reading, M, R, false>(x, ldx, w, ldw, nullptr, sums, lds, j, n);
  for (; j < n; ++j) {
    for (int m = 0; m < M; ++m) {
      for (int r = 0; r < R; ++r) sums[m * lds + j] += x[m * ldx + r] * float(w[r * ldw + j]);
    }
  }
}

// R rows for all tokens; from the second group of tokens on the rows come from a cache.
template <typename T, Reading reading, int R>
HETEGEN_INLINE void axpy_tokens(
    const float* x, int64_t ldx, const T* w, int64_t ldw, const T* then, float* sums, int64_t lds, int64_t m,
    int64_t n) {
  int64_t i = 0;
  if (m >= 4) {
    axpy_rows<T, reading, 4, R>(x, ldx, w, ldw, then, sums, lds, n);
    for (i = 4; i + 4 <= m; i += 4) axpy_rows<T, kRows, 4, R>(x + i * ldx, ldx, w, ldw, nullptr, sums + i * lds, lds, n);
  } else if (m >= 2) {
    axpy_rows<T, reading, 2, R>(x, ldx, w, ldw, then, sums, lds, n);
    i = 2;
  } else {
    axpy_rows<T, reading, 1, R>(x, ldx, w, ldw, then, sums, lds, n);
    i = 1;
  }
  for (; i < m; ++i) axpy_rows<T, kRows, 1, R>(x + i * ldx, ldx, w, ldw, nullptr, sums + i * lds, lds, n);
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

// The sums of a block of rows of all tokens, R rows at once, in n columns; the few that are left are not prefetched.
// `next` is where what the thread reads after it begins.
template <typename T, Reading reading, int R>
void partial_sums(
    const float* x, int64_t ldx, const T* w, int64_t ldw, const T* next, float* sums, int64_t lds, int64_t m, int64_t n,
    int64_t rows) {
  for (int64_t i = 0; i < m; ++i) std::fill_n(sums + i * lds, n, 0.f);
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    const T* then = r + 2 * R <= rows ? w + (r + R) * ldw : next;
    axpy_tokens<T, reading, R>(x + r, ldx, w + r * ldw, ldw, then, sums, lds, m, n);
  }
  for (; r < rows; ++r) axpy_tokens<T, kRows, 1>(x + r, ldx, w + r * ldw, ldw, nullptr, sums, lds, m, n);
}

// Columns of each of so many pieces of n: a multiple of kTogether.
inline int64_t piece_width(int64_t n, int64_t pieces) {
  const int64_t most = pieces * kTogether;
  return (n + most - 1) / most * kTogether;
}

// out[m, j] = sum over k rows of x[m, k] * w[k, j] (+ bias[j]); `sums` is [blocks, m, n] of float32 to work in. Where
// there are fewer blocks than threads are kept busy with (many tokens, whose sums are large), each is cut into pieces of
// the columns.
template <typename T, Reading reading>
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
      partial_sums<T, reading, 8>(x + r, ldx, w + r * ldw + lo, ldw, next, own, n, m, columns, rows);
    } else {
      partial_sums<T, reading, 4>(x + r, ldx, w + r * ldw + lo, ldw, next, own, n, m, columns, rows);
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

#define HETEGEN_EXPORT_PARTIAL(NAME, T, PREFIX, READING)                                                                \
  extern "C" void PREFIX##_partial_linear_##NAME(                                                                       \
      const void* x, int64_t ldx, const void* w, int64_t ldw, const void* bias, void* out, void* sums, int64_t m,       \
      int64_t n, int64_t k) {                                                                                           \
    partial_linear<T, READING>((const float*)x, ldx, (const T*)w, ldw, (const T*)bias, (T*)out, (float*)sums, m, n, k); \
  }

HETEGEN_EXPORT_ALL(HETEGEN_EXPORT_PARTIAL)

// Blocks of a partial Linear, which is given sums for each.
extern "C" int64_t partial_blocks(int64_t m, int64_t n, int64_t k) {
  return int64_t(RowBlocks(m, n, k).starts(k).size()) - 1;
}
