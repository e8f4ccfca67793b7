// PWLU on a CPU: y = K[c, j] x + Z[c, j], its gradient, and the sums that the gradients of the parameters are made of.
//
// Values are bit for bit those of relu_deploy/nn/pwlu_function.py::evaluate: the same operations in the same order,
// without fused multiply-adds (compile with -ffp-contract=off). Sums run in an order that depends on shapes only, never
// on threads: float32 over at most FLUSH elements, float64 from there.
//
// Tables have `pitch` columns for `segments` used ones; pitch is a multiple of 8. Two layouts: "rows", where a run of
// `length` elements lies in one channel (N, C, length), and "columns", where channels lie side by side (rows, C).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using i64 = int64_t;
using Pair = float __attribute__((vector_size(8)));  // a gradient g and g * (x - left), added as one

constexpr i64 STAGE = 512;       // elements between two steps of the work; scratch stays in the first-level cache
constexpr i64 FLUSH = 1 << 14;   // elements that the float32 sums of one channel take
constexpr i64 LANES = 8;         // sums in turn, so that an addition need not wait for the one before it
constexpr i64 PIECE = 1 << 16;   // elements of one task
constexpr i64 MOST_PIECES = 64;

// NaN lands on segment 0, whose slope and offset keep it NaN.
inline int32_t segment_of(float along, float width, float intervals) {
  float place = std::floor(along / width * intervals);
  place = place > -1.0f ? place : -1.0f;
  place = place < intervals ? place : intervals;
  return static_cast<int32_t>(place + 1.0f);
}

// One channel: its constants, and tables of `pitch` entries.
struct Channel {
  float left, width, intervals;
  const float *slopes, *offsets;
  i64 pitch;
};

inline void add(Pair& sum, float grad, float along) { sum += Pair{grad, grad * along}; }

#ifdef __AVX2__
struct Place {
  __m256 along;
  __m256i segment;
};

// (x - left) / width * intervals, by a product where that surely has the same floor. The two differ by less than
// 6 * 2^-24 of their size, which between the boundaries is at most 31 (tables of 32): under 2^-16.
constexpr float NEAR = 1.0f / (1 << 15);

inline Place locate(const Channel& c, __m256 x) {
  const __m256 along = _mm256_sub_ps(x, _mm256_set1_ps(c.left)), most = _mm256_set1_ps(c.intervals);
  __m256 place = _mm256_mul_ps(along, _mm256_set1_ps(c.intervals / c.width));
  const __m256 off = _mm256_sub_ps(place, _mm256_round_ps(place, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const __m256 near = _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), off), _mm256_set1_ps(NEAR), _CMP_LT_OQ);
  if (_mm256_movemask_ps(near)) place = _mm256_mul_ps(_mm256_div_ps(along, _mm256_set1_ps(c.width)), most);
  place = _mm256_floor_ps(place);
  place = _mm256_min_ps(_mm256_max_ps(place, _mm256_set1_ps(-1.0f)), most);  // the second operand wins over NaN
  return {along, _mm256_cvttps_epi32(_mm256_add_ps(place, _mm256_set1_ps(1.0f)))};
}

// A table of up to 32 entries is read by permutations: gathers cost several times as much on many CPUs.
template <int BLOCKS>
inline __m256 pick(const float* table, __m256i index) {
  __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  if constexpr (BLOCKS > 1)
    found = _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index), bit3);
  if constexpr (BLOCKS > 2) {
    __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 16), index);
    if constexpr (BLOCKS > 3)
      upper = _mm256_blendv_ps(upper, _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 24), index), bit3);
    found = _mm256_blendv_ps(found, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)));
  }
  return found;
}

template <int BLOCKS>
i64 forward_vectors(const Channel& c, const float* x, float* y, i64 n) {
  i64 i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 value = _mm256_loadu_ps(x + i);
    const __m256i at = locate(c, value).segment;
    _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_mul_ps(pick<BLOCKS>(c.slopes, at), value), pick<BLOCKS>(c.offsets, at)));
  }
  return i;
}

inline void add_low(Pair* sum, __m128 pair) {
  double* at = reinterpret_cast<double*>(sum);
  const __m128 old = _mm_castpd_ps(_mm_load_sd(at));
  _mm_store_sd(at, _mm_castps_pd(_mm_add_ps(old, pair)));
}

template <int BLOCKS>
i64 backward_vectors(const Channel& c, const float* x, const float* grad, float* dx, i64 n, Pair* sums) {
  i64 i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 g = _mm256_loadu_ps(grad + i);
    const Place p = locate(c, _mm256_loadu_ps(x + i));
    _mm256_storeu_ps(dx + i, _mm256_mul_ps(pick<BLOCKS>(c.slopes, p.segment), g));
    if (!sums) continue;
    const __m256 gu = _mm256_mul_ps(g, p.along);
    const __m256 low = _mm256_unpacklo_ps(g, gu), high = _mm256_unpackhi_ps(g, gu);  // pairs 0 1 4 5 and 2 3 6 7
    // Segments as eight bytes of one register.
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(p.segment), _mm256_extracti128_si256(p.segment, 1));
    const uint64_t at = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
    const __m128 quarter[4] = {_mm256_castps256_ps128(low), _mm256_castps256_ps128(high),
                               _mm256_extractf128_ps(low, 1), _mm256_extractf128_ps(high, 1)};
    for (int q = 0; q < 4; q++) {
      add_low(sums + 2 * q * c.pitch + (at >> (16 * q) & 255), quarter[q]);
      add_low(sums + (2 * q + 1) * c.pitch + (at >> (16 * q + 8) & 255), _mm_movehl_ps(quarter[q], quarter[q]));
    }
  }
  return i;
}
#endif

void forward_run(const Channel& c, const float* x, float* y, i64 n) {
  i64 i = 0;
#ifdef __AVX2__
  if (c.pitch == 8) i = forward_vectors<1>(c, x, y, n);
  if (c.pitch == 16) i = forward_vectors<2>(c, x, y, n);
  if (c.pitch == 24) i = forward_vectors<3>(c, x, y, n);
  if (c.pitch == 32) i = forward_vectors<4>(c, x, y, n);
#endif
  for (; i < n; i++) {
    const int32_t at = segment_of(x[i] - c.left, c.width, c.intervals);
    y[i] = c.slopes[at] * x[i] + c.offsets[at];
  }
}

// sums: (LANES, pitch), or null.
void backward_run(const Channel& c, const float* x, const float* grad, float* dx, i64 n, Pair* sums) {
  i64 i = 0;
#ifdef __AVX2__
  if (c.pitch == 8) i = backward_vectors<1>(c, x, grad, dx, n, sums);
  if (c.pitch == 16) i = backward_vectors<2>(c, x, grad, dx, n, sums);
  if (c.pitch == 24) i = backward_vectors<3>(c, x, grad, dx, n, sums);
  if (c.pitch == 32) i = backward_vectors<4>(c, x, grad, dx, n, sums);
#endif
  for (; i < n; i++) {
    const float along = x[i] - c.left;
    const int32_t at = segment_of(along, c.width, c.intervals);
    dx[i] = c.slopes[at] * grad[i];
    if (sums) add(sums[i % LANES * c.pitch + at], grad[i], along);
  }
}

// Empties float32 sums of `lanes` lanes over `size` segments into float64.
void flush(std::vector<Pair>& sums, i64 lanes, i64 size, double* total) {
  for (i64 lane = 0; lane < lanes; lane++)
    for (i64 i = 0; i < size; i++)
      for (int k = 0; k < 2; k++) total[2 * i + k] += static_cast<double>(sums[lane * size + i][k]);
  std::fill(sums.begin(), sums.end(), Pair{0, 0});
}

// The sums of all pieces, in order.
void reduce(const std::vector<double>& parts, i64 pieces, i64 size, double* out) {
  std::fill(out, out + size, 0.0);
  for (i64 p = 0; p < pieces; p++)
    for (i64 i = 0; i < size; i++) out[i] += parts[p * size + i];
}

// The right boundary, `least` or more beyond the left one, as Parameters.as_work has it; NaN stays NaN.
inline float apart(float left, float right, float least) {
  const float nearest = left + least;
  const float wide = right > nearest ? right : nearest >= right ? nearest : right + nearest;
  return right + (wide - right);
}

i64 pieces_of(i64 count, i64 size) { return std::clamp<i64>(count / size, 1, MOST_PIECES); }

// Constants of the columns of one row, or of a few rows together if they are short.
struct Columns {
  i64 channels, repeat;  // `repeat` rows at a time
  float intervals;
  std::vector<float> left, width;
  std::vector<int32_t> start;
  int32_t segment[STAGE];
  float along[STAGE];

  Columns(const float* l, const float* w, i64 count, i64 segments, i64 pitch)
      : channels(count), repeat(std::max<i64>(1, STAGE / count)), intervals(static_cast<float>(segments - 2)) {
    for (i64 i = 0; i < count * repeat; i++) {
      left.push_back(l[i % count]), width.push_back(w[i % count]);
      start.push_back(static_cast<int32_t>(i % count * pitch));
    }
  }

  void locate(const float* __restrict x, i64 column, i64 n) {
    const float *l = left.data() + column, *w = width.data() + column;
    const int32_t* s = start.data() + column;
    for (i64 i = 0; i < n; i++) {
      along[i] = x[i] - l[i];
      segment[i] = segment_of(along[i], w[i], intervals) + s[i];
    }
  }
};

}  // namespace

extern "C" {

// Tables of pwlu_function.py::tables_of, in the same roundings. In: (channels,), values (channels, intervals + 1).
// Out: width (channels,); slopes and offsets (channels, pitch), whose last columns are left as they are.
void pwlu_tables(const float* left, const float* right, const float* values, const float* low, const float* high,
                 i64 channels, i64 intervals, i64 pitch, float least, float* width, float* slopes, float* offsets) {
  for (i64 c = 0; c < channels; c++) {
    const float end = apart(left[c], right[c], least), *v = values + c * (intervals + 1);
    float *k = slopes + c * pitch, *z = offsets + c * pitch;
    width[c] = end - left[c];
    const float step = width[c] / static_cast<float>(intervals);
    k[0] = low[c], z[0] = v[0] - k[0] * left[c];
    for (i64 i = 0; i < intervals; i++) {
      k[i + 1] = (v[i + 1] - v[i]) / step;
      z[i + 1] = v[i] - k[i + 1] * (left[c] + step * static_cast<float>(i));
    }
    k[intervals + 1] = high[c], z[intervals + 1] = v[intervals] - k[intervals + 1] * end;
  }
}

// Gradients of the parameters from the sums of a backward pass (channels, pitch, 2), in float64, as
// pwlu_function.py::parameter_gradients has them. Out: one each, values (channels, intervals + 1).
void pwlu_gradients(const double* sums, const float* left, const float* right, const float* values, const float* low,
                    const float* high, i64 channels, i64 intervals, i64 pitch, float least, float* d_left,
                    float* d_right, float* d_values, float* d_low, float* d_high) {
  const double n = static_cast<double>(intervals);
  std::vector<double> d(intervals + 1);
  for (i64 c = 0; c < channels; c++) {
    const double *s = sums + c * pitch * 2, *last = s + 2 * (intervals + 1);
    const float* v = values + c * (intervals + 1);
    const double width = static_cast<double>(apart(left[c], right[c], least)) - static_cast<double>(left[c]);
    double to_left = 0, to_right = 0;
    std::fill(d.begin(), d.end(), 0.0);
    d[0] = s[0], d[intervals] += last[0];
    for (i64 i = 0; i < intervals; i++) {
      const double inner = s[2 * (i + 1)], along = s[2 * (i + 1) + 1] / width;
      const double slope = (static_cast<double>(v[i + 1]) - static_cast<double>(v[i])) * (n / width);
      d[i] += static_cast<double>(i + 1) * inner - along * n;  // (B_{i+1} - x) / d
      d[i + 1] += along * n - static_cast<double>(i) * inner;  // (x - B_i) / d
      to_left += slope * (along - inner);                       // K_i (x - B_R) / (B_R - B_L)
      to_right -= slope * along;                                // -K_i (x - B_L) / (B_R - B_L)
    }
    d_left[c] = static_cast<float>(to_left - static_cast<double>(low[c]) * s[0]);
    d_right[c] = static_cast<float>(to_right - static_cast<double>(high[c]) * last[0]);
    d_low[c] = static_cast<float>(s[1]), d_high[c] = static_cast<float>(last[1] - last[0] * width);
    for (i64 i = 0; i <= intervals; i++) d_values[c * (intervals + 1) + i] = static_cast<float>(d[i]);
  }
}

// x, y: (outer, channels, length). left, width: (channels,). slopes, offsets: (channels, pitch).
void pwlu_forward_rows(const float* x, float* y, i64 outer, i64 length, const float* left, const float* width,
                       const float* slopes, const float* offsets, i64 channels, i64 segments, i64 pitch, int threads) {
  const i64 pieces = (length + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 task = 0; task < outer * channels * pieces; task++) {
    const i64 row = task / pieces, c = row % channels, first = task % pieces * PIECE;
    const Channel channel{left[c], width[c], static_cast<float>(segments - 2), slopes + c * pitch, offsets + c * pitch,
                          pitch};
    forward_run(channel, x + row * length + first, y + row * length + first, std::min(PIECE, length - first));
  }
}

// sums: (channels, pitch, 2), or null if they are not wanted.
void pwlu_backward_rows(const float* x, const float* grad, float* dx, double* sums, i64 outer, i64 length,
                        const float* left, const float* width, const float* slopes, i64 channels, i64 segments,
                        i64 pitch, int threads) {
  const i64 all = outer * length, pieces = pieces_of(all, PIECE), size = channels * pitch * 2;
  std::vector<double> parts(sums ? pieces * size : 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (i64 task = 0; task < channels * pieces; task++) {
    const i64 c = task / pieces, piece = task % pieces, end = all * (piece + 1) / pieces;
    const Channel channel{left[c], width[c], static_cast<float>(segments - 2), slopes + c * pitch, nullptr, pitch};
    std::vector<Pair> lanes(LANES * pitch, Pair{0, 0});
    double* total = sums ? parts.data() + piece * size + c * pitch * 2 : nullptr;
    i64 held = 0;
    for (i64 i = all * piece / pieces, n; i < end; i += n) {
      n = std::min({FLUSH, end - i, length - i % length});
      const i64 at = (i / length * channels + c) * length + i % length;
      backward_run(channel, x + at, grad + at, dx + at, n, sums ? lanes.data() : nullptr);
      held += n;
      if (sums && (held >= FLUSH || i + n == end)) flush(lanes, LANES, pitch, total), held = 0;
    }
  }
  if (sums) reduce(parts, pieces, size, sums);
}

// x, y: (rows, channels).
void pwlu_forward_columns(const float* x, float* y, i64 rows, i64, const float* left, const float* width,
                          const float* slopes, const float* offsets, i64 channels, i64 segments, i64 pitch,
                          int threads) {
#pragma omp parallel num_threads(threads)
  {
    Columns k(left, width, channels, segments, pitch);
    const i64 steps = (rows + k.repeat - 1) / k.repeat;
#pragma omp for schedule(static)
    for (i64 step = 0; step < steps; step++) {
      const i64 first = step * k.repeat, count = std::min(k.repeat, rows - first) * channels;
      for (i64 column = 0; column < count; column += STAGE) {
        const i64 n = std::min(STAGE, count - column), at = first * channels + column;
        k.locate(x + at, column, n);
        for (i64 i = 0; i < n; i++) y[at + i] = slopes[k.segment[i]] * x[at + i] + offsets[k.segment[i]];
      }
    }
  }
}

void pwlu_backward_columns(const float* x, const float* grad, float* dx, double* sums, i64 rows, i64,
                           const float* left, const float* width, const float* slopes, i64 channels, i64 segments,
                           i64 pitch, int threads) {
  // A piece has many rows for each of its sums; one that had few would spend its time emptying them.
  const i64 pieces = pieces_of(rows, 16 * segments), size = channels * pitch * 2;
  std::vector<double> parts(sums ? pieces * size : 0);
#pragma omp parallel num_threads(threads)
  {
    Columns k(left, width, channels, segments, pitch);
    std::vector<Pair> lane(channels * pitch, Pair{0, 0});  // neighbours have sums of their own: one lane is enough
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < pieces; piece++) {
      const i64 end = rows * (piece + 1) / pieces;
      i64 held = 0;
      for (i64 row = rows * piece / pieces, taken; row < end; row += taken) {
        taken = std::min(k.repeat, end - row);
        for (i64 column = 0; column < taken * channels; column += STAGE) {
          const i64 n = std::min(STAGE, taken * channels - column), at = row * channels + column;
          k.locate(x + at, column, n);
          for (i64 i = 0; i < n; i++) {
            dx[at + i] = slopes[k.segment[i]] * grad[at + i];
            if (sums) add(lane[k.segment[i]], grad[at + i], k.along[i]);
          }
        }
        held += taken;
        if (sums && (held >= FLUSH || row + taken == end))
          flush(lane, 1, channels * pitch, parts.data() + piece * size), held = 0;
      }
    }
  }
  if (sums) reduce(parts, pieces, size, sums);
}

}  // extern "C"
