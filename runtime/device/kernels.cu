// The chain's arithmetic on the GPU: the noise of runtime/sampling/noise.py, the update of runtime/sampling/chain.py, the sums of runtime/sampling/sums.py.
//
// Compiled by NVRTC, so nothing is included. -fmad=false: every product and sum is rounded on its own, as in the NumPy form.
// The structs are those of runtime/device/layout.py, field by field. No thread waits for another, so a plain loop over all
// threads computes the same; tests/runtime/device runs this file that way.

typedef unsigned int u32;
typedef unsigned long long u64;

struct Job {          // one batch
    u64 seed;
    int canvas_width;  // of the canvas that the windows are cut from, in pixels
    int valid;         // rows that mean something; the others are padding
    int steps;         // rows of the table
    int multistep;     // 1 where the table reads the x0 of the step before
};

struct Row {          // one row of the batch
    u64 slice;
    u64 level_run;     // level * 2^32 + run, a word of the noise
    int top, left;     // the window in the canvas
    int place;         // where its window's sums lie
    int view;          // 0..3: which mirrored view of the window it saw
    int level, run;    // 1..K, 0..R-1
};

struct Step {         // one row of the sampler's table
    long long t;
    float a, b, c, d;
    float low, span;   // with a learned variance the standard deviation is exp(low + mix * span)
};

struct State {
    int step;          // the row of the table that is being run
    u32 bad;           // the smallest code of a value that was not finite, GOOD if none was
    u32 bad_features;  // 1 if an encoder's output was not finite
    u32 unused;
};

#define GOOD 0xffffffffu
#define PHILOX_ROUNDS 10

static __device__ __forceinline__ void philox(u64 word[4], u64 key) {
    // Salmon et al. 2011, Philox4x64-10 with the key (key, 0).
    u64 key0 = key, key1 = 0;
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        u64 low0 = 0xD2E7470EE14C6C93ull * word[0], high0 = __umul64hi(0xD2E7470EE14C6C93ull, word[0]);
        u64 low1 = 0xCA5A826395121157ull * word[2], high1 = __umul64hi(0xCA5A826395121157ull, word[2]);
        word[0] = high1 ^ word[1] ^ key0;
        word[1] = low1;
        word[2] = high0 ^ word[3] ^ key1;
        word[3] = low0;
        key0 += 0x9E3779B97F4A7C15ull;
        key1 += 0xBB67AE8584CAA73Bull;
    }
}

struct Pair { float first, second; };

// Not inlined: the code is there once instead of a dozen times, and NVRTC takes a third of the time.
static __device__ __noinline__ Pair box_muller(u64 word) {
    float r = sqrtf(-2.0f * logf((float)(u32)word * 0x1p-32f + 0x1p-33f));
    float theta = (float)(int)(u32)(word >> 32) * 0x1.921fb6p-30f;  // 2 pi 2^-32
    float sine, cosine;
    sincosf(theta, &sine, &cosine);
    return {r * cosine, r * sine};
}

static __device__ __forceinline__ bool not_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
}

static __device__ __forceinline__ void report(State *state, u32 code) {
    if (code < *(volatile u32 *)&state->bad) atomicMin(&state->bad, code);
}

// One thread's share of a window: the pixels whose normals come from one Philox block, four words of two pixels each.
// Threads are counted along a line of the window, `spans` blocks a line, then over its lines.
template <class Each>
static __device__ __forceinline__ void over_block(
    const Job *job, const Row *row, int thread, int height, int width, int spans, bool noisy, int step, Each each) {
    int y = thread / spans, span = thread % spans;
    if (y >= height) return;
    u64 stride = (u64)(job->canvas_width + 1) / 2;
    u64 line = (u64)(row->top + y) * stride;  // the first word of the canvas's line
    u64 first = line + (u64)(row->left / 2), last = line + (u64)((row->left + width - 1) / 2);
    u64 block = first / 4 + (u64)span;
    if (4 * block > last) return;
    u64 word[4] = {block + 1, (u64)(long long)(step + 1), row->level_run, row->slice};
    if (noisy) philox(word, job->seed);
    for (int i = 0; i < 4; ++i) {
        u64 number = 4 * block + (u64)i;
        if (number < first || number > last) continue;
        Pair z = {0.0f, 0.0f};
        if (noisy) z = box_muller(word[i]);
        int x = (int)(2 * (number - line)) - row->left;  // -1 in a window that begins with a word's second half
        if (x >= 0) each(y * width + x, z.first);
        if (x + 1 < width) each(y * width + x + 1, z.second);
    }
}

// out [B,H,W]: the normals of `step` (-1 is x_T's). Grid (threads of a window, rows).
extern "C" __global__ void cdiff_noise(float *out, const Job *job, const Row *rows, int step, int height, int width, int spans) {
    int row = blockIdx.y;
    float *mine = out + (u64)row * height * width;
    over_block(job, rows + row, blockIdx.x * blockDim.x + threadIdx.x, height, width, spans, true, step,
               [&](int pixel, float z) { mine[pixel] = z; });
}

// The chain's start: x = x_T, previous = 0, t = the table's first, step 0, nothing bad. Grid as above.
extern "C" __global__ void cdiff_start(
    float *x, float *previous, long long *t, State *state, const Job *job, const Row *rows, const Step *table,
    int height, int width, int spans) {
    int row = blockIdx.y, thread = blockIdx.x * blockDim.x + threadIdx.x;
    u64 base = (u64)row * height * width;
    over_block(job, rows + row, thread, height, width, spans, true, -1, [&](int pixel, float z) {
        x[base + pixel] = z;
        previous[base + pixel] = 0.0f;
    });
    if (thread == 0) t[row] = table[0].t;
    if (thread == 0 && row == 0) {
        state->step = 0;
        state->bad = GOOD;
    }
}

// One row of the table: x = a x + b x0 + c previous + d z, z drawn here. `mix` is null without a learned variance.
// The next step's t is filled in too: the network has read this one's. Grid as above.
extern "C" __global__ void cdiff_update(
    float *x, const float *x0, const float *mix, float *previous, long long *t, State *state, const Job *job,
    const Row *rows, const Step *table, int height, int width, int spans) {
    int row = blockIdx.y, thread = blockIdx.x * blockDim.x + threadIdx.x, step = state->step;
    u64 base = (u64)row * height * width;
    const Step now = table[step];
    bool valid = row < job->valid, multistep = job->multistep != 0;
    u32 code = (u32)(2 * step) * gridDim.y + (u32)row;
    over_block(job, rows + row, thread, height, width, spans, now.d != 0.0f, step, [&](int pixel, float z) {
        u64 at = base + pixel;
        float estimate = x0[at];
        if (valid && not_finite(estimate)) report(state, code);
        float next = x[at] * now.a;
        next += estimate * now.b;
        if (now.c != 0.0f) next += previous[at] * now.c;
        if (multistep) previous[at] = estimate;
        if (mix != 0) {
            float share = mix[at];
            if (valid && not_finite(share)) report(state, code + gridDim.y);
            // Nichol & Dhariwal 2021, equation 15.
            if (now.d != 0.0f) next += expf(share * now.span + now.low) * z;
        } else if (now.d != 0.0f) {
            next += z * now.d;
        }
        x[at] = next;
    });
    if (thread == 0 && step + 1 < job->steps) t[row] = table[step + 1].t;
}

// Go on to the next step. One thread.
extern "C" __global__ void cdiff_advance(State *state) { state->step += 1; }

// Add the final x [B,H,W] as fractions clip((x + 1)/2, 0, 1) to the sums [places, K + R, H, W]: over runs for each level, then over
// levels for each run, mirrored back. One thread a pixel goes through the rows in order, so that every run adds alike.
// kept [places,K,R,H,W] is null unless every run's map is wanted. Grid (pixels of a window).
extern "C" __global__ void cdiff_sum(
    const float *x, float *sums, unsigned char *kept, State *state, const Job *job, const Row *rows, int batch, int levels,
    int runs, int height, int width) {
    int pixel = blockIdx.x * blockDim.x + threadIdx.x;
    int area = height * width;
    if (pixel >= area) return;
    int line = pixel / width, column = pixel % width;
    for (int i = 0; i < job->valid; ++i) {
        const Row row = rows[i];
        int from_line = row.view & 2 ? height - 1 - line : line, from_column = row.view & 1 ? width - 1 - column : column;
        float value = x[(u64)i * area + (u64)from_line * width + from_column];
        if (not_finite(value)) report(state, (u32)(2 * job->steps) * (u32)batch + (u32)i);
        float fraction = fminf(fmaxf((value + 1.0f) * 0.5f, 0.0f), 1.0f);
        u64 place = (u64)row.place * (levels + runs);
        sums[(place + row.level - 1) * area + pixel] += fraction;
        sums[(place + levels + row.run) * area + pixel] += fraction;
        if (kept != 0) {
            u64 map = ((u64)row.place * levels + row.level - 1) * runs + row.run;
            kept[map * area + pixel] = (unsigned char)rintf(fraction * 255.0f);
        }
    }
}

// Set bad_features if one of `count` values of 2 or 4 bytes (float16, float32) is not finite. Grid-stride loop.
extern "C" __global__ void cdiff_finite(const void *values, u64 count, int bytes, State *state) {
    u64 threads = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += threads) {
        bool bad = bytes == 2 ? (((const unsigned short *)values)[i] & 0x7c00u) == 0x7c00u
                              : (((const u32 *)values)[i] & 0x7f800000u) == 0x7f800000u;
        if (bad) state->bad_features = 1;
    }
}
