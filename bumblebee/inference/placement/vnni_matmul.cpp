// Matmuls with int8 and int4 weights on CPUs that have AVX-512 VNNI. The layouts are made by vnni_weights.py.
//
// A product with few rows is bound by memory bandwidth, so each panel of 32 rows of the weight is one stream of bytes, read from
// the first to the last. One vector of 64 bytes holds 16 rows x 4 inputs; vpdpbusd multiplies it by the same 4 activations for all
// rows and adds the four products of each row to its lane. Nothing is summed across lanes.
//
// Activations keep 16 bits of fixed point, relative to the largest of their row: a high and a low digit of 8 bits,
// x = unit * (254 * high + low). Sums of products are exact within a group of int4 and within a row of int8, and the order of
// everything else is fixed: the result of a row does not depend on the other rows, nor on the number of threads.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int PANEL = 32;         // rows of the weight that are stored together: two vectors
constexpr int GROUP = 32;         // inputs that share a scale and a zero in int4
constexpr int ROWS = 4;           // rows of activations that read a panel together
constexpr int DIGIT = 127;        // digits are -127 ... 127
constexpr int BASE = 2 * DIGIT;   // of the high digit
constexpr int OFFSET_INT8 = 128;  // codes are stored unsigned
constexpr int OFFSET_INT4 = 8;
constexpr float SMALLEST = 1e-30f;  // largest activation of a row: what lies below is zero, and its reciprocal is finite

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float* out, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(out, lanes, x); }

inline void store(BFloat16* out, __m512 x, __mmask16 lanes) {  // to nearest, ties to even
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
    _mm512_mask_cvtepi32_storeu_epi16(out, lanes, rounded);
}

// One row of activations. Padding is zero.
struct Digits {
    std::vector<int8_t> high, low;
    int32_t sum_high = 0, sum_low = 0;
    std::vector<float> group_sums;  // of BASE * high + low over each 32 inputs, for int4
    float unit = 0;
};

template <typename T>
void split(const T* x, int64_t inputs, int64_t padded, Digits& digits) {
    float largest = SMALLEST, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t k = 0; k < inputs; ++k) {
        const float value = to_float(x[k]);
        largest = std::max(largest, std::fabs(value));
        poison += value * 0;  // NaN if any activation is not finite
    }
    digits.high.assign(padded, 0);
    digits.low.assign(padded, 0);
    digits.unit = largest / (DIGIT * BASE) + poison;
    if (poison != poison) return;  // all outputs are NaN
    const float scale = DIGIT * BASE / largest;
    int8_t *high = digits.high.data(), *low = digits.low.data();
    int32_t sum_high = 0, sum_low = 0;
#pragma omp simd reduction(+ : sum_high, sum_low)
    for (int64_t k = 0; k < inputs; ++k) {
        const float value = to_float(x[k]) * scale;
        const int32_t upper = int32_t(std::nearbyint(value * (1.0f / BASE)));
        const int32_t lower = int32_t(std::nearbyint(value - float(upper * BASE)));
        high[k] = int8_t(upper);
        low[k] = int8_t(lower);
        sum_high += upper;
        sum_low += lower;
    }
    digits.sum_high = sum_high;
    digits.sum_low = sum_low;
}

inline __m512i four_inputs(const std::vector<int8_t>& digits, int64_t k) {
    int32_t value;
    std::memcpy(&value, digits.data() + k, sizeof value);
    return _mm512_set1_epi32(value);
}

inline __m512 combine(__m512i high, __m512i low) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(BASE), _mm512_cvtepi32_ps(low));
}

inline __m512 from_bfloat16(const uint8_t* values) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// An int8 panel: for each 4 inputs, 32 rows x 4 codes; then 32 scales in fp32.
struct Int8 {
    static constexpr int MULTIPLE = 4;  // of inputs

    static int64_t panel_bytes(int64_t inputs) { return PANEL * inputs + PANEL * sizeof(float); }

    static void prepare(Digits&) {}

    // Products of N rows of activations with the 32 rows of a panel, in the activations' units.
    template <int N>
    static void multiply(const uint8_t* panel, int64_t inputs, const Digits* x, __m512 (&out)[N][2]) {
        __m512i high[N][2] = {}, low[N][2] = {};
        for (int64_t k = 0; k < inputs; k += 4, panel += 4 * PANEL) {
            const __m512i codes[2] = {_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64)};
            for (int n = 0; n < N; ++n) {
                const __m512i upper = four_inputs(x[n].high, k), lower = four_inputs(x[n].low, k);
                for (int half = 0; half < 2; ++half) {
                    high[n][half] = _mm512_dpbusd_epi32(high[n][half], codes[half], upper);
                    low[n][half] = _mm512_dpbusd_epi32(low[n][half], codes[half], lower);
                }
            }
        }
        for (int n = 0; n < N; ++n) {
            const __m512i upper = _mm512_set1_epi32(OFFSET_INT8 * x[n].sum_high);
            const __m512i lower = _mm512_set1_epi32(OFFSET_INT8 * x[n].sum_low);
            for (int half = 0; half < 2; ++half) {
                const __m512 sum = combine(_mm512_sub_epi32(high[n][half], upper), _mm512_sub_epi32(low[n][half], lower));
                out[n][half] = _mm512_mul_ps(sum, _mm512_loadu_ps(panel + 64 * half));
            }
        }
    }
};

// An int4 panel: for each group of 32 inputs, four times 32 rows x 4 bytes, each of which holds the codes of inputs k and k + 4;
// then 32 scales and 32 zeros in bf16.
struct Int4 {
    static constexpr int MULTIPLE = GROUP;
    static constexpr int GROUP_BYTES = PANEL * (GROUP / 2 + 4);

    static int64_t panel_bytes(int64_t inputs) { return inputs / GROUP * GROUP_BYTES; }

    static void prepare(Digits& digits) {
        digits.group_sums.assign(digits.high.size() / GROUP, 0);
        for (size_t k = 0; k < digits.high.size(); ++k) digits.group_sums[k / GROUP] += BASE * digits.high[k] + digits.low[k];
    }

    template <int N>
    static void multiply(const uint8_t* panel, int64_t inputs, const Digits* x, __m512 (&out)[N][2]) {
        const __m512i nibble = _mm512_set1_epi8(15);
        for (int n = 0; n < N; ++n) out[n][0] = out[n][1] = _mm512_setzero_ps();
        for (int64_t group = 0; group < inputs / GROUP; ++group, panel += GROUP_BYTES) {
            __m512i high[N][2] = {}, low[N][2] = {};
            for (int step = 0; step < GROUP / 8; ++step) {
                for (int half = 0; half < 2; ++half) {
                    const __m512i bytes = _mm512_loadu_si512(panel + 128 * step + 64 * half);
                    const __m512i first = _mm512_and_si512(bytes, nibble);
                    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
                    const int64_t k = group * GROUP + 8 * step;
                    for (int n = 0; n < N; ++n) {
                        high[n][half] = _mm512_dpbusd_epi32(high[n][half], first, four_inputs(x[n].high, k));
                        high[n][half] = _mm512_dpbusd_epi32(high[n][half], second, four_inputs(x[n].high, k + 4));
                        low[n][half] = _mm512_dpbusd_epi32(low[n][half], first, four_inputs(x[n].low, k));
                        low[n][half] = _mm512_dpbusd_epi32(low[n][half], second, four_inputs(x[n].low, k + 4));
                    }
                }
            }
            for (int half = 0; half < 2; ++half) {
                const uint8_t* parameters = panel + PANEL * GROUP / 2 + 32 * half;
                const __m512 scale = from_bfloat16(parameters), zero = from_bfloat16(parameters + 2 * PANEL);
                for (int n = 0; n < N; ++n) {
                    const __m512 total = _mm512_set1_ps(x[n].group_sums[group]);
                    const __m512 sum = _mm512_fnmadd_ps(_mm512_set1_ps(OFFSET_INT4), total, combine(high[n][half], low[n][half]));
                    out[n][half] = _mm512_fmadd_ps(scale, sum, out[n][half]);
                    out[n][half] = _mm512_fmadd_ps(zero, total, out[n][half]);
                }
            }
        }
    }
};

// N rows of activations by one panel; `columns` of its rows exist, the others are padding.
template <typename Weight, int N, typename T>
void compute(const uint8_t* panel, int64_t inputs, const Digits* x, T* out, int64_t stride, int64_t columns) {
    __m512 sums[N][2];
    Weight::template multiply<N>(panel, inputs, x, sums);
    for (int n = 0; n < N; ++n) {
        for (int half = 0; half < 2; ++half) {
            const int64_t left = std::clamp<int64_t>(columns - 16 * half, 0, 16);
            const __m512 values = _mm512_mul_ps(sums[n][half], _mm512_set1_ps(x[n].unit));
            store(out + n * stride + 16 * half, values, __mmask16((1 << left) - 1));
        }
    }
}

template <typename Weight, typename T>
void matmul(const T* x, int64_t rows, int64_t inputs, const uint8_t* weight, int64_t outputs, T* out, int threads) {
    const int64_t padded = (inputs + Weight::MULTIPLE - 1) / Weight::MULTIPLE * Weight::MULTIPLE;
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    std::vector<Digits> digits(rows);
    // With few rows, waking the other threads takes longer than this work.
#pragma omp parallel for num_threads(threads) if (rows > 4 * ROWS)
    for (int64_t row = 0; row < rows; ++row) {
        split(x + row * inputs, inputs, padded, digits[row]);
        Weight::prepare(digits[row]);
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t index = 0; index < panels; ++index) {
        const uint8_t* panel = weight + index * Weight::panel_bytes(padded);
        const int64_t first = index * PANEL, columns = std::min<int64_t>(PANEL, outputs - first);
        for (int64_t row = 0; row < rows; row += ROWS) {
            T* target = out + row * outputs + first;
            switch (std::min<int64_t>(ROWS, rows - row)) {
                case 1: compute<Weight, 1>(panel, padded, &digits[row], target, outputs, columns); break;
                case 2: compute<Weight, 2>(panel, padded, &digits[row], target, outputs, columns); break;
                case 3: compute<Weight, 3>(panel, padded, &digits[row], target, outputs, columns); break;
                default: compute<Weight, ROWS>(panel, padded, &digits[row], target, outputs, columns);
            }
        }
    }
}

}  // namespace

// x (rows, inputs) and out (rows, outputs) are contiguous, in fp32 or bf16.
#define MATMUL(name, Weight, T)                                                                                                 \
    extern "C" void name(const T* x, int64_t rows, int64_t inputs, const uint8_t* weight, int64_t outputs, T* out, int threads) { \
        matmul<Weight>(x, rows, inputs, weight, outputs, out, threads);                                                         \
    }

MATMUL(matmul_int8_float32, Int8, float)
MATMUL(matmul_int8_bfloat16, Int8, BFloat16)
MATMUL(matmul_int4_float32, Int4, float)
MATMUL(matmul_int4_bfloat16, Int4, BFloat16)
