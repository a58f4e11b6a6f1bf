// Host programs: Linears on few tokens and the pointwise operations between them, as one call. Behind linear.cpp
// and partial_linear.cpp.
//
// What lies between two operations stays in memory of the calling thread, which all programs share: it is in the cache.

#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

namespace {

// One operation. Places are positions in the table of pointers; those from `given` on are offsets into scratch memory.
struct Instruction {
  int64_t operation;
  int64_t dtype;   // 0: float32, 1: bfloat16, 2: float16
  int64_t out, first, second, third;  // a Linear: x, weight, bias (-1: none)
  int64_t wide;    // float32 copy of x, -1: not needed
  int64_t sums;    // float32 sums of a partial Linear
  int64_t x_offset, bias_offset;      // elements before the first that is read
  int64_t m, n, k;  // tokens, columns of the result, columns that are read; elements for what is pointwise: n
  int64_t ldx, ldw;
};

constexpr int64_t kManyElements = 1 << 15;  // from which further threads pay

// Linears of each reading, partial ones of each, then what is pointwise.
enum : int64_t { kPartialLinear = kReadings, kRelu = 2 * kReadings, kSilu, kGelu, kGeluTanh, kMul };

struct Places {
  void* const* pointers;
  int64_t given;
  const int64_t* offsets;
  char* scratch;
  void* operator[](int64_t place) const {
    if (place < 0) return nullptr;
    return place < given ? pointers[place] : scratch + offsets[place - given];
  }
};

template <typename T>
HETEGEN_INLINE void store(const typename Ops<T>::Elements& e, T* p) {
  if constexpr (Ops<T>::count == 1) {
    e.part[0].store(p);
  } else {
    at::vec::convert_from_float<T>(e.part[0], e.part[1]).store(p);
  }
}

struct Relu {
  static HETEGEN_INLINE Vec of(Vec x, Vec) {
    return at::vec::maximum(x, Vec(0.f));
  }
};
struct Silu {
  static HETEGEN_INLINE Vec of(Vec x, Vec) {
    return x / (Vec(1.f) + x.neg().exp());
  }
};
struct Gelu {
  static HETEGEN_INLINE Vec of(Vec x, Vec) {
    return x * Vec(0.5f) * (Vec(1.f) + (x * Vec(float(M_SQRT1_2))).erf());
  }
};
struct GeluTanh {
  static HETEGEN_INLINE Vec of(Vec x, Vec) {
    const Vec inner = Vec(float(M_SQRT2 * M_2_SQRTPI * 0.5)) * (x + Vec(0.044715f) * x * x * x);
    return Vec(0.5f) * x * (Vec(1.f) + inner.tanh());
  }
};
struct Mul {
  static HETEGEN_INLINE Vec of(Vec x, Vec y) {
    return x * y;
  }
};

template <typename T, typename F>
HETEGEN_INLINE void pointwise_step(const T* a, const T* b, T* out) {
  auto left = Ops<T>::load(a);
  const auto right = Ops<T>::load(b);
  HETEGEN_UNROLL for (int c = 0; c < Ops<T>::count; ++c) left.part[c] = F::of(left.part[c], right.part[c]);
  store<T>(left, out);
}

// out = F(a, b), computed in float32. What fills no step goes through buffers.
template <typename T, typename F>
void pointwise(const T* a, const T* b, T* out, int64_t n) {
  constexpr int64_t step = Ops<T>::step;
  const int64_t whole = n / step;
#pragma omp parallel for if (n >= kManyElements)
  for (int64_t j = 0; j < whole; ++j) pointwise_step<T, F>(a + j * step, b + j * step, out + j * step);
  const int64_t i = whole * step;
  if (i < n) {
    T x[step] = {}, y[step] = {}, z[step];
    std::copy(a + i, a + n, x);
    std::copy(b + i, b + n, y);
    pointwise_step<T, F>(x, y, z);
    std::copy(z, z + (n - i), out + i);
  }
}

template <typename T>
void between(const Instruction& i, const Places& at) {
  const T* a = (const T*)at[i.first];
  const T* b = i.operation == kMul ? (const T*)at[i.second] : a;
  T* out = (T*)at[i.out];
  if (i.operation == kRelu) return pointwise<T, Relu>(a, b, out, i.n);
  if (i.operation == kSilu) return pointwise<T, Silu>(a, b, out, i.n);
  if (i.operation == kGelu) return pointwise<T, Gelu>(a, b, out, i.n);
  if (i.operation == kGeluTanh) return pointwise<T, GeluTanh>(a, b, out, i.n);
  pointwise<T, Mul>(a, b, out, i.n);
}

template <typename T, typename X>
const X* activations(const Instruction& i, const Places& at, int64_t& ldx) {
  const T* x = (const T*)at[i.first] + i.x_offset;
  ldx = i.ldx;
  if constexpr (std::is_same_v<T, X>) return x;
  X* wide = (X*)at[i.wide];
  for (int64_t row = 0; row < i.m; ++row) std::copy(x + row * i.ldx, x + row * i.ldx + i.k, wide + row * i.k);
  ldx = i.k;
  return wide;
}

template <typename T, Reading reading>
void whole_or_partial(const Instruction& i, const Places& at, bool partial, int64_t pieces) {
  int64_t ldx;
  const T *w = (const T*)at[i.second], *bias = (const T*)at[i.third];
  if (bias) bias += i.bias_offset;
  T* out = (T*)at[i.out];
  if (partial) {
    const float* x = activations<T, float>(i, at, ldx);
    partial_linear<T, reading>(x, ldx, w, i.ldw, bias, out, (float*)at[i.sums], i.m, i.n, i.k);
  } else {
    const auto* x = activations<T, typename DotOps<T>::X>(i, at, ldx);
    linear<T, reading>({{x, w, out, i.m}}, ldx, i.ldw, bias, i.n, i.k, pieces);
  }
}

template <typename T>
void execute(const Instruction& i, const Places& at, int64_t pieces) {
  if (i.operation >= kRelu) return between<T>(i, at);
  const bool partial = i.operation >= kPartialLinear;
  const int64_t reading = i.operation % kReadings;
  if (reading == kRows) return whole_or_partial<T, kRows>(i, at, partial, pieces);
  if (reading == kTiles) return whole_or_partial<T, kTiles>(i, at, partial, pieces);
  whole_or_partial<T, kTilesThroughL2>(i, at, partial, pieces);
}

// Memory for what lies between the operations, 64 bytes aligned; it grows with the largest program of the thread.
char* scratch(int64_t nbytes) {
  static thread_local std::vector<char> memory;
  if (int64_t(memory.size()) < nbytes + 64) memory.resize(nbytes + 64);
  return (char*)((uintptr_t(memory.data()) + 63) / 64 * 64);
}

}  // namespace

struct HetegenProgram {
  const Instruction* instructions;
  int64_t count;
  void* const* pointers;
  int64_t given;
  const int64_t* offsets;
  int64_t scratch_bytes;
  double* ended_s;  // of each instruction, since the call began
  int64_t ahead_bytes;  // of weights that are read at most while a trip's activations are awaited
  int64_t read_bytes;   // of weights that the last trip read so
};

namespace {

constexpr int64_t kElementBytes[] = {4, 2, 2};      // of the dtypes
constexpr int64_t kLineBytes = 64, kPage = 4096;    // what a load brings; what is read between two looks at `over_`
constexpr int64_t kBetweenQuestions = 1 << 16;      // bytes that the asking thread reads
constexpr std::chrono::microseconds kPatience{10};  // between two questions when it has nothing to read any more

// Reads weights into the threads' caches while what they are multiplied with is awaited: of the Linears that the program
// begins with, pieces of kRowsAhead rows that the threads have in turn, up to ahead_bytes. The first thread asks whether
// it is `over`; when it is, all end within a page. The first pieces(i) of Linear i are computed by who has read them.
class ReadingAhead {
 public:
  ReadingAhead(const HetegenProgram& program, const Places& at)
      : program_(program), at_(at), pieces_(new std::atomic<int64_t>[program.count]()) {}

  // Whether there is something to read.
  static bool pays(const HetegenProgram& program) {
    return program.ahead_bytes > 0 && program.count > 0 && is_whole(program.instructions[0]);
  }

  template <typename Over>
  void read(const Over& over) {
#pragma omp parallel
    {
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      int64_t left = program_.ahead_bytes, unasked = 0, read = 0;
      for (int64_t i = 0; i < program_.count && is_whole(program_.instructions[i]); ++i) {
        const Instruction& one = program_.instructions[i];
        const int64_t piece_bytes = kRowsAhead * one.k * kElementBytes[one.dtype];
        const int64_t pieces = std::min(left / piece_bytes, one.n / kRowsAhead);
        for (int64_t piece = thread; piece < pieces && !is_over(); piece += threads) {
          note(pieces_[i], piece + 1);
          read += read_piece(one, piece, [&](int64_t nbytes) {
            if (thread != 0 || (unasked += nbytes) < kBetweenQuestions) return;
            unasked = 0;
            ask(over);
          });
        }
        left -= pieces * piece_bytes;
      }
      read_bytes_ += read;
      ++through_;
      if (thread == 0) {
        while (!is_over() && through_ < threads) {
          ask(over);
          const auto asked = std::chrono::steady_clock::now();
          while (through_ < threads && std::chrono::steady_clock::now() - asked < kPatience) {}
        }
      }
    }
  }
  int64_t pieces(int64_t i) const {
    return pieces_[i];
  }
  int64_t read_bytes() const {
    return read_bytes_;
  }

 private:
  static bool is_whole(const Instruction& one) {
    return one.operation < kPartialLinear && one.m * one.n * one.k >= kParallel;
  }
  static void note(std::atomic<int64_t>& most, int64_t pieces) {
    int64_t seen = most.load(std::memory_order_relaxed);
    while (seen < pieces && !most.compare_exchange_weak(seen, pieces, std::memory_order_relaxed)) {}
  }
  bool is_over() const {
    return over_.load(std::memory_order_relaxed);
  }
  template <typename Over>
  void ask(const Over& over) {
    if (over()) over_.store(true, std::memory_order_relaxed);
  }
  // The bytes that were read of it; `tell` is told of each page.
  template <typename Tell>
  int64_t read_piece(const Instruction& one, int64_t piece, const Tell& tell) {
    const int64_t row_bytes = one.k * kElementBytes[one.dtype], stride = one.ldw * kElementBytes[one.dtype];
    const char* w = (const char*)at_[one.second] + piece * kRowsAhead * stride;
    for (int64_t r = 0; r < kRowsAhead; ++r, w += stride) {
      for (int64_t i = 0; i < row_bytes; i += kPage) {
        if (is_over()) return r * row_bytes + i;
        const int64_t end = std::min(i + kPage, row_bytes);
        for (int64_t j = i; j < end; j += kLineBytes) (void)*(const volatile char*)(w + j);
        tell(end - i);
      }
    }
    return kRowsAhead * row_bytes;
  }

  const HetegenProgram& program_;
  const Places& at_;
  std::unique_ptr<std::atomic<int64_t>[]> pieces_;
  std::atomic<int64_t> read_bytes_{0}, through_{0};
  std::atomic<bool> over_{false};
};

void run(const HetegenProgram& program, const Places& at, const ReadingAhead* ahead) {
  const auto began = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < program.count; ++i) {
    const Instruction& one = program.instructions[i];
    const int64_t pieces = ahead ? ahead->pieces(i) : 0;
    if (one.dtype == 0) {
      execute<float>(one, at, pieces);
    } else if (one.dtype == 1) {
      execute<c10::BFloat16>(one, at, pieces);
    } else {
      execute<c10::Half>(one, at, pieces);
    }
    program.ended_s[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
}

}  // namespace

// A worker's trip: wait for what came down, compute, and let go of what waits for the results. Nonzero is what the wait
// returned (nothing has been computed then). `wait`, `pending` and `gate` may be missing. While `pending` returns
// `not_yet` weights are read ahead; when it has returned 0 nothing is left to wait for.
extern "C" int64_t run_trip(
    int (*wait)(void*), int (*pending)(void*), int64_t not_yet, void* event, HetegenProgram* program, uint32_t* gate,
    uint32_t number) {
  const Places at{program->pointers, program->given, program->offsets, scratch(program->scratch_bytes)};
  std::optional<ReadingAhead> ahead;
  bool is_there = false;
  const auto over = [&] {
    const int state = pending(event);
    is_there = state == 0;
    return state != not_yet;
  };
  program->read_bytes = 0;
  if (pending != nullptr && ReadingAhead::pays(*program) && !over()) {
    ahead.emplace(*program, at).read(over);
    program->read_bytes = ahead->read_bytes();
  }
  if (wait != nullptr && !is_there) {
    const int failed = wait(event);
    if (failed) return failed;
  }
  run(*program, at, ahead ? &*ahead : nullptr);
  if (gate != nullptr) reinterpret_cast<std::atomic<uint32_t>*>(gate)->store(number, std::memory_order_release);
  return 0;
}

// A `pending` for which 1 is `not_yet`: as much is read ahead as may be.
extern "C" int still_pending(void*) {
  return 1;
}
