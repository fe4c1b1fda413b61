/* A BERT encoder for CPUs with AVX-512 VNNI: token ids of texts that lie one after another to a vector a text.

   Each call takes one slab of whole texts through all layers on the calling thread: what lies between the layers
   stays in that core's cache, and threads never wait for each other. The linear layers multiply in one of

     F32  float32
     I16  activations and weights rounded to +-2047, with a scale for each row (found as it comes) and for each
          output; the integer sums are exact. Twice the rate of F32.
     I8   activations rounded to 0..255 with a scale and a zero for each row, weights to +-127 with a scale for each
          output. Four times the rate of F32.

   and all else is float32. What a text gives depends on that text alone, down to the last bit: every sum has one
   order, whatever lies beside the text and on however many threads. Knows nothing of Python. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { F32, I16, I8 };                     /* precision: the logarithm of how many inputs a word of 4 bytes holds */
enum { NONE, GELU, RELU, TANH };           /* activation */
enum { FIRST, MEAN, MAX, POOLER };         /* pooling */
enum { COLUMNS = 32, ROWS = 14 };          /* a tile of sums: what 28 of the 32 registers hold */
enum { BLOCK = 8 * ROWS };                 /* rows that go through a linear layer together */
enum { CHUNK = 256 };                      /* words (512 inputs of int16) whose sum surely fits an int32 */

typedef struct {
    int32_t outputs, inputs;
    const void *weight;                    /* [outputs / 32][words][32] words */
    const float *scale, *bias, *sums;      /* [outputs] each; sums: of an output's int8 weights */
} Linear;

typedef struct { const float *weight, *bias; } Norm;
typedef struct { Linear qkv, out, up, down; Norm attention, output; } Layer;

typedef struct {
    int32_t precision, activation, layers, width, heads, inner, first_position;
    float epsilon;
    const float *words, *positions, *types; /* embedding tables, [.][width] each */
    Norm embeddings;
    Linear pooler;                          /* always F32 */
    const Layer *layer;
    int32_t features;                       /* what is asked of each segment: */
    const int32_t *at, *pooling;            /* [features] behind which layer, 0 being the embeddings, and how */
} Model;

/* Ranges of tokens, each to be pooled; starts is 0 where they are the texts. */
typedef struct { long count; const int64_t *starts, *stops; } Segments;

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* rows x 32 outputs: the sums over `steps` words of a's rows (lda bytes apart) times b [steps][32], as floats.
   int16 sums are taken over to floats each CHUNK words, before they could exceed an int32. */
#define DEFINE_TILE(NAME, VECTOR, ZERO, LOAD, REPEAT, MULTIPLY, FLOATS, CHUNKED)                                   \
    INLINE void NAME(const char *a, long lda, const char *b, long steps, const int rows, float *tile) {           \
        const long chunk = CHUNKED ? CHUNK : steps;                                                               \
        for (long start = 0; start < steps; start += chunk) {                                                     \
            const long stop = start + chunk < steps ? start + chunk : steps;                                      \
            VECTOR sums[ROWS][2];                                                                                 \
            UNROLL for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = ZERO;                                 \
            const char *third[5] = {a + start * 4, third[0] + 3 * lda, third[0] + 6 * lda, third[0] + 9 * lda, third[0] + 12 * lda}; \
            for (long s = start; s < stop; s++) {                                                                 \
                const VECTOR left = LOAD(b + s * 128), right = LOAD(b + s * 128 + 64);                            \
                UNROLL for (int r = 0; r < rows; r++) {                                                           \
                    const VECTOR word = REPEAT(third[r / 3] + r % 3 * lda);                                       \
                    MULTIPLY(sums[r][0], word, left);                                                             \
                    MULTIPLY(sums[r][1], word, right);                                                            \
                }                                                                                                 \
                UNROLL for (int i = 0; i < (rows + 2) / 3; i++) { third[i] += 4; __asm__("" : "+r"(third[i])); }   \
            }                                                                                                     \
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int half = 0; half < 2; half++) {                   \
                __m512 sum = FLOATS(sums[r][half]);                                                               \
                float *place = tile + r * COLUMNS + half * 16;                                                    \
                if (CHUNKED && start) sum = _mm512_add_ps(sum, _mm512_loadu_ps(place));                           \
                _mm512_storeu_ps(place, sum);                                                                     \
            }                                                                                                     \
        }                                                                                                         \
    }

#define REPEAT_F32(p) _mm512_set1_ps(*(const float *)(p))
#define REPEAT_INT(p) _mm512_set1_epi32(*(const int32_t *)(p))
/* Written out, since compilers move sums between registers and memory when they see intrinsics here. */
#define MULTIPLY_F32(sum, word, b) __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(word), "v"(b))
#define MULTIPLY_I16(sum, word, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(word), "v"(b))
#define MULTIPLY_I8(sum, word, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(word), "v"(b))
#define SAME(x) (x)

DEFINE_TILE(tile_f32, __m512, _mm512_setzero_ps(), _mm512_loadu_ps, REPEAT_F32, MULTIPLY_F32, SAME, 0)
DEFINE_TILE(tile_i16, __m512i, _mm512_setzero_si512(), _mm512_loadu_si512, REPEAT_INT, MULTIPLY_I16, _mm512_cvtepi32_ps, 1)
DEFINE_TILE(tile_i8, __m512i, _mm512_setzero_si512(), _mm512_loadu_si512, REPEAT_INT, MULTIPLY_I8, _mm512_cvtepi32_ps, 0)

/* As many rows as a tile of the registers holds; returns how many that were. */
#define DEFINE_TILES(NAME, TILE)                                                                                  \
    __attribute__((noinline)) static int NAME(const char *a, long lda, const char *b, long steps, int rows, float *tile) { \
        if (rows >= 14) return TILE(a, lda, b, steps, 14, tile), 14;                                              \
        if (rows >= 7) return TILE(a, lda, b, steps, 7, tile), 7;                                                 \
        if (rows >= 4) return TILE(a, lda, b, steps, 4, tile), 4;                                                 \
        if (rows >= 2) return TILE(a, lda, b, steps, 2, tile), 2;                                                 \
        return TILE(a, lda, b, steps, 1, tile), 1;                                                                \
    }

DEFINE_TILES(tiles_f32, tile_f32)
DEFINE_TILES(tiles_i16, tile_i16)
DEFINE_TILES(tiles_i8, tile_i8)

typedef int (*Tiles)(const char *, long, const char *, long, int, float *);

/* Below, constants come first in min and max, which give the second of two where one is NaN: it must not get lost. */

/* exp, to 2 units in the last place: Cephes' polynomial after x = n ln 2 + r. */
INLINE __m512 exp_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* u (1 - Phi(u)), Phi being the normal distribution's cumulative function, for u from 0 to 32 PIECE, where nothing is
   left of it: a cubic in each of 32 pieces, [power][piece], through Chebyshev's nodes; within 5e-7. */
#define PIECE 0.17f
static float TAIL[4][32];

__attribute__((constructor)) static void set_tail(void) {
    for (int piece = 0; piece < 32; piece++) {
        double x[4], f[4]; /* nodes in -1/2 to 1/2 about the middle of the piece; Newton's divided differences there */
        for (int i = 0; i < 4; i++) {
            x[i] = 0.5 * cos((2 * i + 1) * M_PI / 8);
            const double u = PIECE * (piece + x[i]);
            f[i] = u * 0.5 * erfc(u * M_SQRT1_2);
        }
        for (int order = 1; order < 4; order++)
            for (int i = 3; i >= order; i--) f[i] = (f[i] - f[i - 1]) / (x[i] - x[i - order]);
        double power[4] = {f[3], 0, 0, 0};
        for (int i = 2; i >= 0; i--) {
            for (int j = 3; j > 0; j--) power[j] = power[j - 1] - x[i] * power[j];
            power[0] = f[i] - x[i] * power[0];
        }
        for (int i = 0; i < 4; i++) TAIL[i][piece] = power[i];
    }
}

/* x Phi(x): max(x, 0) less the tail at |x|. */
INLINE __m512 gelu_ps(__m512 x) {
    const __m512 round = _mm512_set1_ps(0x1.8p23f); /* added, it leaves the nearest integer in the lowest bits */
    const __m512 u = _mm512_mul_ps(_mm512_min_ps(_mm512_set1_ps(31 * PIECE), _mm512_abs_ps(x)), _mm512_set1_ps(1 / PIECE));
    const __m512 nearest = _mm512_add_ps(u, round), t = _mm512_sub_ps(u, _mm512_sub_ps(nearest, round));
    const __m512i piece = _mm512_castps_si512(nearest);
    __m512 tail = _mm512_permutex2var_ps(_mm512_loadu_ps(TAIL[3]), piece, _mm512_loadu_ps(TAIL[3] + 16));
    for (int i = 2; i >= 0; i--)
        tail = _mm512_fmadd_ps(tail, t, _mm512_permutex2var_ps(_mm512_loadu_ps(TAIL[i]), piece, _mm512_loadu_ps(TAIL[i] + 16)));
    return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), tail);
}

/* 1 - 2 / (exp(2x) + 1) */
INLINE __m512 tanh_ps(__m512 x) {
    const __m512 e = exp_ps(_mm512_min_ps(_mm512_set1_ps(60.0f), _mm512_add_ps(x, x)));
    return _mm512_sub_ps(_mm512_set1_ps(1.0f), _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, _mm512_set1_ps(1.0f))));
}

/* Rows of floats to rows of the precision's own numbers, each with its scale and zero; float32 stays where it is. */
static const char *quantize(int precision, const float *x, long rows, int width, char *out, float *scale, float *zero) {
    if (precision == F32) return (const char *)x;
    for (long r = 0; r < rows; r++, x += width) {
        __m512 low = _mm512_loadu_ps(x), high = low;
        __mmask16 numbers = _mm512_cmp_ps_mask(low, low, _CMP_ORD_Q);
        for (int i = 16; i < width; i += 16) {
            const __m512 v = _mm512_loadu_ps(x + i);
            numbers &= _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
            low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v);
        }
        float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
        if (precision == I16) {
            const float size = (most > -least ? most : -least) / 2047.0f;
            const __m512 by = _mm512_set1_ps(size > 0 ? 1 / size : 0);
            int16_t *q = (int16_t *)out + (long)r * width;
            for (int i = 0; i < width; i += 16) {
                const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), by));
                _mm256_storeu_si256((__m256i *)(q + i), _mm512_cvtsepi32_epi16(v));
            }
            scale[r] = size, zero[r] = 0;
        } else {
            least = least < 0 ? least : 0, most = most > 0 ? most : 0;
            const float size = (most - least) / 255.0f, inverse = size > 0 ? 1 / size : 0;
            const __m512 by = _mm512_set1_ps(inverse);
            const __m512i shift = _mm512_cvtps_epi32(_mm512_set1_ps(-least * inverse));
            uint8_t *q = (uint8_t *)out + (long)r * width;
            for (int i = 0; i < width; i += 16) {
                __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), by));
                v = _mm512_max_epi32(_mm512_add_epi32(v, shift), _mm512_setzero_si512());
                _mm_storeu_si128((__m128i *)(q + i), _mm512_cvtusepi32_epi8(v));
            }
            scale[r] = size, zero[r] = (float)_mm512_cvtsi512_si32(shift);
        }
        if (numbers != 0xffff) scale[r] = NAN;
    }
    return out;
}

/* out [rows][outputs] of x [rows][inputs]; of more rows than BLOCK the first BLOCK. */
static void linear(int precision, const Linear *l, const float *x, long rows, float *out, int activation, char *scratch) {
    static const Tiles TILES[] = {tiles_f32, tiles_i16, tiles_i8};
    const Tiles tiles = TILES[precision];
    if (rows > BLOCK) rows = BLOCK;
    float scale[BLOCK], zero[BLOCK], tile[ROWS * COLUMNS] __attribute__((aligned(64)));
    const char *a = quantize(precision, x, rows, l->inputs, scratch, scale, zero);
    const long steps = l->inputs >> precision, lda = steps * 4;
    for (int c = 0; c < l->outputs; c += COLUMNS) {
        const char *b = (const char *)l->weight + c * steps * 4;
        __m512 bias[2], by[2], sums[2];
        for (int half = 0; half < 2; half++) {
            bias[half] = _mm512_loadu_ps(l->bias + c + half * 16);
            by[half] = precision == F32 ? bias[half] : _mm512_loadu_ps(l->scale + c + half * 16);
            sums[half] = precision == I8 ? _mm512_loadu_ps(l->sums + c + half * 16) : bias[half];
        }
        for (int start = 0, n; start < rows; start += n) {
            n = tiles(a + start * lda, lda, b, steps, rows - start, tile);
            for (int r = 0; r < n; r++) {
                float *place = out + (long)(start + r) * l->outputs + c;
                for (int half = 0; half < 2; half++) {
                    __m512 v = _mm512_load_ps(tile + r * COLUMNS + half * 16);
                    if (precision == I8) v = _mm512_fnmadd_ps(sums[half], _mm512_set1_ps(zero[start + r]), v);
                    v = precision == F32 ? _mm512_add_ps(v, bias[half])
                                         : _mm512_fmadd_ps(v, _mm512_mul_ps(by[half], _mm512_set1_ps(scale[start + r])), bias[half]);
                    if (activation == GELU) v = gelu_ps(v);
                    if (activation == TANH) v = tanh_ps(v);
                    if (activation == RELU) v = _mm512_max_ps(_mm512_setzero_ps(), v);
                    _mm512_storeu_ps(place + half * 16, v);
                }
            }
        }
    }
}

/* x [rows][width] = layer norm of x + y, in place; y may be NULL. */
static void add_norm(float *x, const float *y, long rows, int width, const Norm *norm, float epsilon) {
    for (long r = 0; r < rows; r++, x += width) {
        __m512 sum = _mm512_setzero_ps(), square = sum;
        for (int i = 0; i < width; i += 16) {
            __m512 v = _mm512_loadu_ps(x + i);
            if (y) v = _mm512_add_ps(v, _mm512_loadu_ps(y + (long)r * width + i));
            _mm512_storeu_ps(x + i, v);
            sum = _mm512_add_ps(sum, v);
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
        for (int i = 0; i < width; i += 16) {
            const __m512 v = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
            square = _mm512_fmadd_ps(v, v, square);
        }
        const __m512 by = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(square) / width + epsilon));
        for (int i = 0; i < width; i += 16) {
            const __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), by);
            _mm512_storeu_ps(x + i, _mm512_fmadd_ps(v, _mm512_loadu_ps(norm->weight + i), _mm512_loadu_ps(norm->bias + i)));
        }
    }
}

/* Softmax of a row of scores without its last division; returns the divisor. */
static float softmax(float *row, int n) {
    const __mmask16 last = (__mmask16)(0xffff >> (-n & 15));
    const int whole = (n - 1) & ~15;
    __m512 most = _mm512_mask_loadu_ps(_mm512_set1_ps(-3e38f), last, row + whole), sum = _mm512_setzero_ps();
    for (int i = 0; i < whole; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(row + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int i = 0; i < whole; i += 16) {
        const __m512 v = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(row + i), most));
        _mm512_storeu_ps(row + i, v);
        sum = _mm512_add_ps(sum, v);
    }
    const __m512 v = _mm512_maskz_mov_ps(last, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(row + whole), most)));
    _mm512_storeu_ps(row + whole, v);
    return _mm512_reduce_add_ps(_mm512_add_ps(sum, v));
}

/* 16 rows of 16 as columns, in place: in turn, of rows 1, 2, 4, 8 apart the odd halves change places with the even. */
INLINE void transpose(__m512 *rows) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    UNROLL for (int step = 1; step < 16; step *= 2) {
        const __m512i by = _mm512_set1_epi32(step), theirs = _mm512_set1_epi32(16);
        const __mmask16 odd = _mm512_test_epi32_mask(lane, by);
        const __m512i low = _mm512_mask_add_epi32(lane, odd, _mm512_sub_epi32(lane, by), theirs);
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, by), odd, lane, theirs);
        UNROLL for (int i = 0; i < 16; i++) {
            if (i & step) continue;
            const __m512 a = rows[i], b = rows[i + step];
            rows[i] = _mm512_permutex2var_ps(a, low, b);
            rows[i + step] = _mm512_permutex2var_ps(a, high, b);
        }
    }
}

/* The context [queries][width] of a text's first queries, of its qkv [n][3 width]. */
static void attend(const Model *m, const float *qkv, int n, int queries, float *context, float *scratch) {
    const int width = m->width, depth = width / m->heads, stride = 3 * width;
    const int columns = (n + 31) & ~31, deep = (depth + 31) & ~31;
    float *keys = scratch, *values = keys + (long)columns * depth, *scores = values + (long)n * deep;
    float tile[ROWS * COLUMNS] __attribute__((aligned(64))), divisor[ROWS];
    const __m512 by = _mm512_set1_ps(1.0f / __builtin_sqrtf(depth));
    for (int head = 0; head < m->heads; head++) {
        const float *q = qkv + head * depth, *k = q + width, *v = k + width;
        for (int c = 0; c < columns; c += 16) /* keys [columns / 32][depth][32], scaled */
            for (int i = 0; i < depth; i += 16) {
                float *place = keys + (long)(c & ~31) * depth + (c & 16) + i * 32;
                __m512 block[16];
                UNROLL for (int j = 0; j < 16; j++)
                    block[j] = c + j < n ? _mm512_mul_ps(_mm512_loadu_ps(k + (long)(c + j) * stride + i), by) : _mm512_setzero_ps();
                transpose(block);
                UNROLL for (int j = 0; j < 16; j++) _mm512_storeu_ps(place + j * 32, block[j]);
            }
        for (int c = 0; c < deep; c += 16) /* values [deep / 32][n][32] */
            for (int j = 0; j < n; j++)
                _mm512_storeu_ps(values + (long)(c & ~31) * n + (c & 16) + j * 32,
                                 c < depth ? _mm512_loadu_ps(v + (long)j * stride + c) : _mm512_setzero_ps());
        for (int start = 0, rows = 0; start < queries; start += rows) {
            for (int c = 0; c < columns; c += 32) {
                rows = tiles_f32((const char *)(q + (long)start * stride), stride * 4L, (const char *)(keys + (long)c * depth),
                                 depth, queries - start, tile);
                for (int r = 0; r < rows; r++)
                    memcpy(scores + (long)r * columns + c, tile + r * COLUMNS, COLUMNS * sizeof(float));
            }
            for (int r = 0; r < rows; r++) divisor[r] = 1 / softmax(scores + (long)r * columns, n);
            for (int c = 0; c < deep; c += 32) {
                tiles_f32((const char *)scores, columns * 4L, (const char *)(values + (long)c * n), n, rows, tile);
                for (int r = 0; r < rows; r++)
                    for (int i = 0; i < 32 && c + i < depth; i += 16)
                        _mm512_storeu_ps(context + (long)(start + r) * width + head * depth + c + i,
                                         _mm512_mul_ps(_mm512_load_ps(tile + r * COLUMNS + i), _mm512_set1_ps(divisor[r])));
            }
        }
    }
}

/* hidden [tokens][width]: the sums of the three embeddings, normed. */
static void embed(const Model *m, const int64_t *ids, const int64_t *types, const int64_t *offsets, long texts, float *hidden) {
    const long padding = m->first_position - 1;  /* of RoBERTa's kin: it keeps its place where a text has it */
    for (long t = 0; t < texts; t++)
        for (long i = offsets[t], next = m->first_position; i < offsets[t + 1]; i++) {
            const float *word = m->words + ids[i] * m->width, *type = m->types + types[i] * m->width;
            const float *position = m->positions + (ids[i] == padding ? padding : next++) * m->width;
            for (int j = 0; j < m->width; j++) hidden[i * m->width + j] = word[j] + position[j] + type[j];
        }
    add_norm(hidden, 0, offsets[texts], m->width, &m->embeddings, m->epsilon);
}

/* out [width] of n hidden states, zeros of none. */
static void pool(const float *hidden, long n, int width, int pooling, float *out) {
    const __m512 by = _mm512_set1_ps(1.0f / n);
    if (n < 1) { memset(out, 0, width * sizeof(float)); return; }
    if (pooling == FIRST || pooling == POOLER) n = 1;
    for (int j = 0; j < width; j += 16) {
        __m512 v = _mm512_loadu_ps(hidden + j);
        for (long i = 1; i < n; i++) {
            const __m512 next = _mm512_loadu_ps(hidden + i * width + j);
            v = pooling == MEAN ? _mm512_add_ps(v, next)
                                : _mm512_mask_max_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v, next);
        }
        _mm512_storeu_ps(out + j, pooling == MEAN ? _mm512_mul_ps(v, by) : v);
    }
}

static long larger(long a, long b) { return a > b ? a : b; }

/* Bytes of scratch that `encode` needs for a slab of that many tokens, whose longest text has `longest`. */
long scratch_bytes(const Model *m, long tokens, long longest) {
    const long columns = (longest + 31) & ~31, depth = m->width / m->heads, deep = (depth + 31) & ~31;
    const long attention = columns * depth + longest * deep + ROWS * columns;
    const long blocks = BLOCK * (2 * larger(m->inner, m->width) + m->width);
    return 4 * (tokens * 5 * m->width + blocks + attention);
}

/* The features of a layer, of all segments, from its output. */
static void pool_layer(const Model *m, int layer, const float *hidden, Segments of, float *out, float *rows, float *projected, char *quantized) {
    const int width = m->width;
    for (int f = 0; f < m->features; f++) {
        if (m->at[f] != layer) continue;
        float *to = out + (long)f * width;
        const long stride = (long)m->features * width;
        for (long s = 0; s < of.count; s++)
            pool(hidden + of.starts[s] * width, of.stops[s] - of.starts[s], width, m->pooling[f], to + s * stride);
        if (m->pooling[f] != POOLER) continue;
        for (long start = 0; start < of.count; start += BLOCK) {
            const long count = of.count - start < BLOCK ? of.count - start : BLOCK;
            for (long s = 0; s < count; s++) memcpy(rows + s * width, to + (start + s) * stride, width * sizeof(float));
            linear(F32, &m->pooler, rows, count, projected, TANH, quantized);
            for (long s = 0; s < count; s++) memcpy(to + (start + s) * stride, projected + s * width, width * sizeof(float));
        }
    }
}

/* Whether of the last layer only the first state of each text is asked for. */
static int only_first(const Model *m) {
    for (int f = 0; f < m->features; f++)
        if (m->at[f] == m->layers && m->pooling[f] != FIRST && m->pooling[f] != POOLER) return 0;
    return m->layers > 0;
}

/* out [segments][features][width]. Text i is tokens offsets[i] to offsets[i + 1] (one at least), segment s tokens
   starts[s] to stops[s]. With starts 0 the segments are the texts, and of a last layer that is asked for its first
   states alone, only those are computed: firsts [texts + 1] counts from 0. */
void encode(const Model *m, const int64_t *ids, const int64_t *types, const int64_t *offsets, long texts,
            const int64_t *starts, const int64_t *stops, long segments, const int64_t *firsts, float *out, float *scratch) {
    const int width = m->width, widest = (int)larger(m->inner, width), p = m->precision;
    const int first = !starts && only_first(m);
    const Segments whole = {texts, offsets, offsets + 1}, given = {segments, starts, stops};
    Segments of = starts ? given : whole;
    long tokens = offsets[texts];
    float *hidden = scratch, *qkv = hidden + tokens * width, *context = qkv + tokens * 3 * width;
    float *inner = context + tokens * width, *projected = inner + (long)BLOCK * widest;
    char *quantized = (char *)(projected + (long)BLOCK * width);
    float *attention = (float *)(quantized + 4L * BLOCK * widest);
    embed(m, ids, types, offsets, texts, hidden);
    pool_layer(m, 0, hidden, of, out, inner, projected, quantized);
    for (int number = 1; number <= m->layers; number++) {
        const Layer *layer = m->layer + number - 1;
        const int last = first && number == m->layers;
        for (long r = 0; r < tokens; r += BLOCK)
            linear(p, &layer->qkv, hidden + r * width, tokens - r, qkv + r * 3 * width, NONE, quantized);
        for (long t = 0; t < texts; t++) {
            const long start = offsets[t], n = offsets[t + 1] - start, to = last ? t : start;
            attend(m, qkv + start * 3 * width, (int)n, last ? 1 : (int)n, context + to * width, attention);
            if (last) memmove(hidden + t * width, hidden + start * width, width * sizeof(float));
        }
        if (last) tokens = texts, of = (Segments){texts, firsts, firsts + 1};
        for (long r = 0; r < tokens; r += BLOCK) {
            const long rows = tokens - r < BLOCK ? tokens - r : BLOCK;
            float *x = hidden + r * width;
            linear(p, &layer->out, context + r * width, rows, projected, NONE, quantized);
            add_norm(x, projected, rows, width, &layer->attention, m->epsilon);
            linear(p, &layer->up, x, rows, inner, m->activation, quantized);
            linear(p, &layer->down, inner, rows, projected, NONE, quantized);
            add_norm(x, projected, rows, width, &layer->output, m->epsilon);
        }
        pool_layer(m, number, hidden, of, out, inner, projected, quantized);
    }
}
