// The fused operations for x86-64 behind a plain C interface; no PyTorch header, so that it compiles in seconds.
//
// This file is compiled once for each instruction set (LOOMVIDEO_ISA = v2, v3 or v4, with -march=x86-64-...), which
// gives three tables of the same kernels, and once more with LOOMVIDEO_DISPATCH, which picks a table by what the
// processor at hand supports. Loops are written so that the compiler vectorises them: a token's row goes through a
// float scratch row that stays in the L1 cache.
//
// Storage types: float, bfloat16 (computed in float) and double (baseline instructions only, for gradient checks).
// Sums over tokens (gradients of weights and modulation rows) are accumulated per run of at most CHUNK tokens and
// the runs added in order, so that results do not depend on the number of threads.

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT64 = 2 };
enum Status { OK = 0, BAD_ROW = 1, BAD_POSITION = 2, OUT_OF_MEMORY = 3, BAD_DTYPE = 4 };

struct NormRopeArguments {
  int64_t num_tensors;       // 1 (plain RMS norm) or 2 (q and k)
  const void* x[2];          // [tokens, heads * head_dim], row stride below
  int64_t x_stride[2];
  const void* weight[2];     // [heads * head_dim], compute type
  const int32_t* positions;  // [tokens, 3] or null for no rotation
  const void* tables;        // [2, max_position, head_dim / 2], compute type
  void* rstd[2];             // [tokens], compute type; written forward, read backward
  void* out[2];              // forward: the result; backward: the gradient of x
  const void* grad[2];       // backward: the gradient of the result
  int64_t grad_stride[2];
  void* weight_grad[2];      // backward: [heads * head_dim], compute type
  int64_t tokens, heads, head_dim, max_position, round_norm, threads;
  double eps;
};

struct LayerNormArguments {
  const void* x;             // [tokens, dim]; backward with a residual: the new residual stream
  int64_t x_stride;
  const void* y;             // [tokens, dim] or null: added to x before the norm
  int64_t y_stride;
  const void* gate;          // [gate_rows, dim] or null: factor of y
  const void* shift;         // [norm_rows, dim]
  const void* scale;         // [norm_rows, dim]
  const int32_t* gate_ids;   // [tokens]
  const int32_t* norm_ids;   // [tokens] or null: row 0 for every token
  void* hidden;              // forward: x + y * gate, or null
  void* out;                 // forward: the norm
  void* mean;                // [tokens], compute type
  void* rstd;                // [tokens], compute type
  const void* grad_out;      // backward
  int64_t grad_out_stride;
  const void* grad_hidden;   // backward, or null
  int64_t grad_hidden_stride;
  void* grad_x;
  void* grad_y;              // or null
  void* grad_gate;           // [gate_rows, dim] or null
  void* grad_shift;          // [norm_rows, dim]
  void* grad_scale;
  int64_t tokens, dim, gate_rows, norm_rows, threads;
  double eps, scale_offset;  // the norm is multiplied by scale_offset + scale
};

struct ResidualArguments {
  const void* x;             // forward: the residual stream; backward: unused
  int64_t x_stride;
  const void* y;
  int64_t y_stride;
  const void* gate;
  const int32_t* ids;
  void* out;                 // forward: x + y * gate; backward: the gradient of y
  const void* grad;
  int64_t grad_stride;
  void* grad_gate;
  int64_t tokens, dim, rows, threads;
};

struct JoinArguments {
  const void* patches;       // [tokens, patch]
  int64_t patches_stride;
  const void* source;
  int64_t source_stride;
  const void* scale;         // [samples], compute type
  const int32_t* ids;        // [tokens]; id == samples means scale 0
  void* out;                 // [tokens, width]: patches, scale * source, 1, scale in two parts, zeros
  int64_t tokens, patch, samples, width, threads;
};

struct KernelTable {
  int (*norm_rope_forward)(int, const NormRopeArguments*);
  int (*norm_rope_backward)(int, const NormRopeArguments*);
  int (*layer_norm_forward)(int, const LayerNormArguments*);
  int (*layer_norm_backward)(int, const LayerNormArguments*);
  int (*residual_forward)(int, const ResidualArguments*);
  int (*residual_backward)(int, const ResidualArguments*);
  int (*join_patches)(int, const JoinArguments*);
};

}  // namespace

#ifdef LOOMVIDEO_DISPATCH

extern "C" const void* loomvideo_kernels_v2();
extern "C" const void* loomvideo_kernels_v3();
extern "C" const void* loomvideo_kernels_v4();

namespace {

int best_level() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? 4 : v3 ? 3 : 2;
}

int level = best_level();

const KernelTable& table(int dtype) {
  const void* chosen = dtype == FLOAT64 || level == 2 ? loomvideo_kernels_v2()
                       : level == 3                   ? loomvideo_kernels_v3()
                                                      : loomvideo_kernels_v4();
  return *static_cast<const KernelTable*>(chosen);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The level in use: 2 (baseline with SSE4.2), 3 (AVX2) or 4 (AVX-512).
int loomvideo_isa() { return level; }

// Use a lower level than the processor's best; returns the level then in use.
int loomvideo_limit_isa(int limit) {
  const int best = best_level();
  level = limit < best ? (limit < 2 ? 2 : limit) : best;
  return level;
}

int loomvideo_norm_rope_forward(int dtype, const NormRopeArguments* a) { return table(dtype).norm_rope_forward(dtype, a); }
int loomvideo_norm_rope_backward(int dtype, const NormRopeArguments* a) { return table(dtype).norm_rope_backward(dtype, a); }
int loomvideo_layer_norm_forward(int dtype, const LayerNormArguments* a) { return table(dtype).layer_norm_forward(dtype, a); }
int loomvideo_layer_norm_backward(int dtype, const LayerNormArguments* a) { return table(dtype).layer_norm_backward(dtype, a); }
int loomvideo_residual_forward(int dtype, const ResidualArguments* a) { return table(dtype).residual_forward(dtype, a); }
int loomvideo_residual_backward(int dtype, const ResidualArguments* a) { return table(dtype).residual_backward(dtype, a); }
int loomvideo_join_patches(int dtype, const JoinArguments* a) { return table(dtype).join_patches(dtype, a); }

}  // extern "C"
#pragma GCC visibility pop

#else  // one instruction set

namespace {

constexpr int64_t CHUNK = 64;

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bfloat16 v) { return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16); }

inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(float v, bfloat16& out) {  // to nearest, ties to even; a NaN stays one
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

inline float square_root(float v) { return __builtin_sqrtf(v); }
inline double square_root(double v) { return __builtin_sqrt(v); }

template <typename T>
struct Scratch {  // freed on every way out; a null pointer means out of memory
  T* data;
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T*>(aligned_alloc(64, bytes));
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

template <typename T, typename C>
inline void load_row(const T* __restrict x, C* __restrict row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] = widen(x[i]);
}

template <typename T, typename C>
inline void store_row(const C* __restrict row, T* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(row[i], out[i]);
}

bool rows_in_range(const int32_t* ids, int64_t tokens, int64_t rows) {
  bool bad = false;
  if (ids == nullptr) return rows >= 1 || tokens == 0;
  for (int64_t i = 0; i < tokens; ++i) bad |= ids[i] < 0 || ids[i] >= rows;
  return !bad;
}

// Runs of tokens that share their row ids and are at most CHUNK long. `first` has room for tokens + 1 entries.
int64_t split_into_runs(const int32_t* a, const int32_t* b, int64_t tokens, int64_t* first) {
  int64_t runs = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const bool starts = i == 0 || i - first[runs - 1] == CHUNK || (a && a[i] != a[i - 1]) || (b && b[i] != b[i - 1]);
    if (starts) first[runs++] = i;
  }
  first[runs] = tokens;
  return runs;
}

// out[row] = the sum of the partial rows whose run belongs to that row, in order.
template <typename C>
void add_runs(const C* partial, int64_t stride, const int64_t* first, int64_t runs, const int32_t* ids, C* out,
              int64_t rows, int64_t dim, int threads) {
  constexpr int64_t BLOCK = 256;
  const int64_t blocks = (dim + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * BLOCK, n = (begin + BLOCK < dim ? BLOCK : dim - begin);
    for (int64_t row = 0; row < rows; ++row) memset(out + row * dim + begin, 0, n * sizeof(C));
    for (int64_t run = 0; run < runs; ++run) {
      C* __restrict to = out + (ids ? ids[first[run]] : 0) * dim + begin;
      const C* __restrict from = partial + run * stride + begin;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    }
  }
}

// Cosines and sines of one token's channel pairs; false if a position is outside the tables.
template <typename C>
inline bool token_angles(const int32_t* position, const C* tables, int64_t head_dim, int64_t max_position,
                         C* __restrict cosines, C* __restrict sines) {
  const int64_t half = head_dim / 2, side = head_dim / 6;
  const int64_t counts[3] = {half - 2 * side, side, side};
  int64_t pair = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t p = position[axis], index = p < 0 ? -p : p;
    if (index >= max_position) return false;
    const C sign = p < 0 ? C(-1) : C(1);
    const C* cos_row = tables + index * half;
    const C* sin_row = tables + (max_position + index) * half;
    for (const int64_t end = pair + counts[axis]; pair < end; ++pair) {
      cosines[pair] = cos_row[pair];
      sines[pair] = sign * sin_row[pair];
    }
  }
  return true;
}

// Turn every channel pair of a row; `direction` -1 turns back.
template <typename C>
inline void rotate(C* __restrict row, const C* __restrict cosines, const C* __restrict sines, int64_t heads,
                   int64_t head_dim, C direction) {
  const int64_t half = head_dim / 2;
  for (int64_t head = 0; head < heads; ++head) {
    C* __restrict h = row + head * head_dim;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const C even = h[2 * j], odd = h[2 * j + 1], c = cosines[j], s = direction * sines[j];
      h[2 * j] = even * c - odd * s;
      h[2 * j + 1] = even * s + odd * c;
    }
  }
}

template <typename T, typename C>
int norm_rope_forward(const NormRopeArguments& a) {
  const int64_t dim = a.heads * a.head_dim;
  int status = OK;
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    Scratch<C> row(dim), angles(a.head_dim);
    int mine = row.data && angles.data ? OK : OUT_OF_MEMORY;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < a.tokens; ++token) {
      if (mine != OK) continue;
      C* cosines = angles.data;
      C* sines = angles.data + a.head_dim / 2;
      if (a.positions && !token_angles(a.positions + 3 * token, static_cast<const C*>(a.tables), a.head_dim,
                                       a.max_position, cosines, sines)) {
        mine = BAD_POSITION;
        continue;
      }
      for (int64_t t = 0; t < a.num_tensors; ++t) {
        const T* __restrict x = static_cast<const T*>(a.x[t]) + token * a.x_stride[t];
        const C* __restrict weight = static_cast<const C*>(a.weight[t]);
        C* __restrict r = row.data;
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < dim; ++i) {
          const C v = widen(x[i]);
          r[i] = v;
          sum += v * v;
        }
        const C rstd = C(1) / square_root(sum / C(dim) + C(a.eps));
        static_cast<C*>(a.rstd[t])[token] = rstd;
        if (a.round_norm && a.positions) {
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) {
            T rounded;
            narrow(r[i] * rstd * weight[i], rounded);
            r[i] = widen(rounded);
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) r[i] = r[i] * rstd * weight[i];
        }
        if (a.positions) rotate(r, cosines, sines, a.heads, a.head_dim, C(1));
        store_row(r, static_cast<T*>(a.out[t]) + token * dim, dim);
      }
    }
    if (mine != OK) {
#pragma omp atomic write
      status = mine;
    }
  }
  return status;
}

template <typename T, typename C>
int norm_rope_backward(const NormRopeArguments& a) {
  const int64_t dim = a.heads * a.head_dim, runs = (a.tokens + CHUNK - 1) / CHUNK;
  int status = OK;
  Scratch<C> partial(runs * dim * a.num_tensors);
  Scratch<int64_t> first(runs + 1);
  if (!partial.data || !first.data) return OUT_OF_MEMORY;
  for (int64_t run = 0; run <= runs; ++run) first.data[run] = run * CHUNK < a.tokens ? run * CHUNK : a.tokens;
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    Scratch<C> rows(2 * dim), angles(a.head_dim);
    int mine = rows.data && angles.data ? OK : OUT_OF_MEMORY;
#pragma omp for schedule(dynamic)
    for (int64_t run = 0; run < runs; ++run) {
      memset(partial.data + run * dim * a.num_tensors, 0, dim * a.num_tensors * sizeof(C));
      for (int64_t token = first.data[run]; token < first.data[run + 1] && mine == OK; ++token) {
        C* cosines = angles.data;
        C* sines = angles.data + a.head_dim / 2;
        if (a.positions && !token_angles(a.positions + 3 * token, static_cast<const C*>(a.tables), a.head_dim,
                                         a.max_position, cosines, sines)) {
          mine = BAD_POSITION;
          break;
        }
        for (int64_t t = 0; t < a.num_tensors; ++t) {
          const T* __restrict x = static_cast<const T*>(a.x[t]) + token * a.x_stride[t];
          const C* __restrict weight = static_cast<const C*>(a.weight[t]);
          C* __restrict weight_grad = partial.data + (run * a.num_tensors + t) * dim;
          C* __restrict g = rows.data;
          C* __restrict normed = rows.data + dim;
          T* __restrict out = static_cast<T*>(a.out[t]) + token * dim;
          const C rstd = static_cast<const C*>(a.rstd[t])[token];
          load_row(static_cast<const T*>(a.grad[t]) + token * a.grad_stride[t], g, dim);
          if (a.positions) rotate(g, cosines, sines, a.heads, a.head_dim, C(-1));
          C dot = 0;
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < dim; ++i) {
            const C n = widen(x[i]) * rstd;
            weight_grad[i] += g[i] * n;
            const C gw = g[i] * weight[i];
            normed[i] = n;
            g[i] = gw;
            dot += gw * n;
          }
          const C mean = dot / C(dim);
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) narrow(rstd * (g[i] - normed[i] * mean), out[i]);
        }
      }
    }
    if (mine != OK) {
#pragma omp atomic write
      status = mine;
    }
  }
  for (int64_t t = 0; t < a.num_tensors && status == OK; ++t) {
    add_runs<C>(partial.data + t * dim, dim * a.num_tensors, first.data, runs, nullptr,
                static_cast<C*>(a.weight_grad[t]), 1, dim, static_cast<int>(a.threads));
  }
  return status;
}

template <typename T, typename C>
int layer_norm_forward(const LayerNormArguments& a) {
  if (!rows_in_range(a.norm_ids, a.tokens, a.norm_rows)) return BAD_ROW;
  if (a.gate && !rows_in_range(a.gate_ids, a.tokens, a.gate_rows)) return BAD_ROW;
  const int64_t dim = a.dim;
  const C offset = C(a.scale_offset);
  int status = OK;
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    Scratch<C> row(dim);
    const int mine = row.data ? OK : OUT_OF_MEMORY;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < a.tokens; ++token) {
      if (mine != OK) continue;
      const T* __restrict x = static_cast<const T*>(a.x) + token * a.x_stride;
      C* __restrict r = row.data;
      if (a.y) {
        const T* __restrict y = static_cast<const T*>(a.y) + token * a.y_stride;
        T* __restrict hidden = static_cast<T*>(a.hidden) + token * dim;
        if (a.gate) {
          const C* __restrict gate = static_cast<const C*>(a.gate) + a.gate_ids[token] * dim;
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) narrow(widen(x[i]) + widen(y[i]) * gate[i], hidden[i]);
        } else {
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) narrow(widen(x[i]) + widen(y[i]), hidden[i]);
        }
        // The norm is of the rounded sum; reading it back from the cache keeps both loops in vectors.
        load_row(hidden, r, dim);
      } else {
        load_row(x, r, dim);
      }
      C sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < dim; ++i) sum += r[i];
      const C mean = sum / C(dim);
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < dim; ++i) squares += (r[i] - mean) * (r[i] - mean);
      const C rstd = C(1) / square_root(squares / C(dim) + C(a.eps));
      static_cast<C*>(a.mean)[token] = mean;
      static_cast<C*>(a.rstd)[token] = rstd;
      const int64_t id = a.norm_ids ? a.norm_ids[token] : 0;
      const C* __restrict shift = static_cast<const C*>(a.shift) + id * dim;
      const C* __restrict scale = static_cast<const C*>(a.scale) + id * dim;
      T* __restrict out = static_cast<T*>(a.out) + token * dim;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) narrow((r[i] - mean) * rstd * (offset + scale[i]) + shift[i], out[i]);
    }
    if (mine != OK) {
#pragma omp atomic write
      status = mine;
    }
  }
  return status;
}

template <typename T, typename C>
int layer_norm_backward(const LayerNormArguments& a) {
  if (!rows_in_range(a.norm_ids, a.tokens, a.norm_rows)) return BAD_ROW;
  if (a.gate && !rows_in_range(a.gate_ids, a.tokens, a.gate_rows)) return BAD_ROW;
  const int64_t dim = a.dim;
  const C offset = C(a.scale_offset);
  int status = OK;
  Scratch<int64_t> first(a.tokens + 1);
  if (!first.data) return OUT_OF_MEMORY;
  const int64_t runs = split_into_runs(a.norm_ids, a.gate ? a.gate_ids : nullptr, a.tokens, first.data);
  const int64_t parts = a.gate ? 3 : 2;  // shift, scale, gate
  Scratch<C> partial(runs * parts * dim);
  if (!partial.data) return OUT_OF_MEMORY;
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    Scratch<C> rows(2 * dim);
    const int mine = rows.data ? OK : OUT_OF_MEMORY;
#pragma omp for schedule(dynamic)
    for (int64_t run = 0; run < runs; ++run) {
      C* __restrict shift_grad = partial.data + run * parts * dim;
      C* __restrict scale_grad = shift_grad + dim;
      C* __restrict gate_grad = shift_grad + 2 * dim;
      memset(shift_grad, 0, parts * dim * sizeof(C));
      const int64_t begin = first.data[run], end = mine == OK ? first.data[run + 1] : begin;
      const int64_t id = a.norm_ids ? a.norm_ids[begin] : 0;
      const C* __restrict scale = static_cast<const C*>(a.scale) + id * dim;
      const C* __restrict gate = a.gate ? static_cast<const C*>(a.gate) + a.gate_ids[begin] * dim : nullptr;
      for (int64_t token = begin; token < end; ++token) {
        const T* __restrict x = static_cast<const T*>(a.x) + token * a.x_stride;
        const T* __restrict grad_out = static_cast<const T*>(a.grad_out) + token * a.grad_out_stride;
        T* __restrict grad_x = static_cast<T*>(a.grad_x) + token * dim;
        C* __restrict g = rows.data;
        C* __restrict normed = rows.data + dim;
        const C mean = static_cast<const C*>(a.mean)[token], rstd = static_cast<const C*>(a.rstd)[token];
        C sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
        for (int64_t i = 0; i < dim; ++i) {
          const C go = widen(grad_out[i]), n = (widen(x[i]) - mean) * rstd;
          shift_grad[i] += go;
          scale_grad[i] += go * n;
          const C gn = go * (offset + scale[i]);
          normed[i] = n;
          g[i] = gn;
          sum += gn;
          dot += gn * n;
        }
        const C mean_g = sum / C(dim), mean_gn = dot / C(dim);
        if (a.grad_hidden) {
          const T* __restrict grad_hidden = static_cast<const T*>(a.grad_hidden) + token * a.grad_hidden_stride;
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) {
            g[i] = rstd * (g[i] - mean_g - normed[i] * mean_gn) + widen(grad_hidden[i]);
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) g[i] = rstd * (g[i] - mean_g - normed[i] * mean_gn);
        }
        store_row(g, grad_x, dim);
        if (gate) {
          const T* __restrict y = static_cast<const T*>(a.y) + token * a.y_stride;
          T* __restrict grad_y = static_cast<T*>(a.grad_y) + token * dim;
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) {
            gate_grad[i] += g[i] * widen(y[i]);
            narrow(g[i] * gate[i], grad_y[i]);
          }
        }
      }
    }
    if (mine != OK) {
#pragma omp atomic write
      status = mine;
    }
  }
  if (status != OK) return status;
  const int threads = static_cast<int>(a.threads);
  add_runs<C>(partial.data, parts * dim, first.data, runs, a.norm_ids, static_cast<C*>(a.grad_shift), a.norm_rows,
              dim, threads);
  add_runs<C>(partial.data + dim, parts * dim, first.data, runs, a.norm_ids, static_cast<C*>(a.grad_scale),
              a.norm_rows, dim, threads);
  if (a.gate) {
    add_runs<C>(partial.data + 2 * dim, parts * dim, first.data, runs, a.gate_ids, static_cast<C*>(a.grad_gate),
                a.gate_rows, dim, threads);
  }
  return OK;
}

template <typename T, typename C>
int residual_forward(const ResidualArguments& a) {
  if (!rows_in_range(a.ids, a.tokens, a.rows)) return BAD_ROW;
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) schedule(static)
  for (int64_t token = 0; token < a.tokens; ++token) {
    const T* __restrict x = static_cast<const T*>(a.x) + token * a.x_stride;
    const T* __restrict y = static_cast<const T*>(a.y) + token * a.y_stride;
    const C* __restrict gate = static_cast<const C*>(a.gate) + a.ids[token] * a.dim;
    T* __restrict out = static_cast<T*>(a.out) + token * a.dim;
#pragma omp simd
    for (int64_t i = 0; i < a.dim; ++i) narrow(widen(x[i]) + widen(y[i]) * gate[i], out[i]);
  }
  return OK;
}

template <typename T, typename C>
int residual_backward(const ResidualArguments& a) {
  if (!rows_in_range(a.ids, a.tokens, a.rows)) return BAD_ROW;
  Scratch<int64_t> first(a.tokens + 1);
  if (!first.data) return OUT_OF_MEMORY;
  const int64_t runs = split_into_runs(a.ids, nullptr, a.tokens, first.data);
  Scratch<C> partial(runs * a.dim);
  if (!partial.data) return OUT_OF_MEMORY;
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) schedule(dynamic)
  for (int64_t run = 0; run < runs; ++run) {
    C* __restrict gate_grad = partial.data + run * a.dim;
    memset(gate_grad, 0, a.dim * sizeof(C));
    const C* __restrict gate = static_cast<const C*>(a.gate) + a.ids[first.data[run]] * a.dim;
    for (int64_t token = first.data[run]; token < first.data[run + 1]; ++token) {
      const T* __restrict y = static_cast<const T*>(a.y) + token * a.y_stride;
      const T* __restrict grad = static_cast<const T*>(a.grad) + token * a.grad_stride;
      T* __restrict out = static_cast<T*>(a.out) + token * a.dim;
#pragma omp simd
      for (int64_t i = 0; i < a.dim; ++i) {
        const C g = widen(grad[i]);
        gate_grad[i] += g * widen(y[i]);
        narrow(g * gate[i], out[i]);
      }
    }
  }
  add_runs<C>(partial.data, a.dim, first.data, runs, a.ids, static_cast<C*>(a.grad_gate), a.rows, a.dim,
              static_cast<int>(a.threads));
  return OK;
}

template <typename T, typename C>
int join_patches(const JoinArguments& a) {
  if (!rows_in_range(a.ids, a.tokens, a.samples + 1)) return BAD_ROW;
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) schedule(static)
  for (int64_t token = 0; token < a.tokens; ++token) {
    const C scale = a.ids[token] == a.samples ? C(0) : static_cast<const C*>(a.scale)[a.ids[token]];
    T* __restrict out = static_cast<T*>(a.out) + token * a.width;
    memcpy(out, static_cast<const T*>(a.patches) + token * a.patches_stride, a.patch * sizeof(T));
    const T* __restrict source = static_cast<const T*>(a.source) + token * a.source_stride;
    for (int64_t i = 0; i < a.patch; ++i) narrow(scale * widen(source[i]), out[a.patch + i]);
    out += 2 * a.patch;
    memset(out, 0, (a.width - 2 * a.patch) * sizeof(T));
    narrow(C(1), out[0]);
    narrow(scale, out[1]);  // what bfloat16 cuts off the scale goes into a column of its own
    narrow(scale - widen(out[1]), out[2]);
  }
  return OK;
}

#if defined(LOOMVIDEO_DOUBLE)
#define BY_DTYPE(name, Arguments)                                      \
  int name##_by_dtype(int dtype, const Arguments* a) {                 \
    if (dtype == FLOAT32) return name<float, float>(*a);               \
    if (dtype == BFLOAT16) return name<bfloat16, float>(*a);           \
    return dtype == FLOAT64 ? name<double, double>(*a) : BAD_DTYPE;    \
  }
#else
#define BY_DTYPE(name, Arguments)                                      \
  int name##_by_dtype(int dtype, const Arguments* a) {                 \
    if (dtype == FLOAT32) return name<float, float>(*a);               \
    return dtype == BFLOAT16 ? name<bfloat16, float>(*a) : BAD_DTYPE;  \
  }
#endif

BY_DTYPE(norm_rope_forward, NormRopeArguments)
BY_DTYPE(norm_rope_backward, NormRopeArguments)
BY_DTYPE(layer_norm_forward, LayerNormArguments)
BY_DTYPE(layer_norm_backward, LayerNormArguments)
BY_DTYPE(residual_forward, ResidualArguments)
BY_DTYPE(residual_backward, ResidualArguments)
BY_DTYPE(join_patches, JoinArguments)

const KernelTable kernels = {
    norm_rope_forward_by_dtype, norm_rope_backward_by_dtype, layer_norm_forward_by_dtype, layer_norm_backward_by_dtype,
    residual_forward_by_dtype,  residual_backward_by_dtype,  join_patches_by_dtype,
};

}  // namespace

#define JOIN(a, b) a##b
#define TABLE_NAME(isa) JOIN(loomvideo_kernels_, isa)
extern "C" const void* TABLE_NAME(LOOMVIDEO_ISA)() { return &kernels; }

#endif  // LOOMVIDEO_DISPATCH
