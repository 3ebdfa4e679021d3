// mma.cuh: products on tensor cores and copies that run on their own; compiled after common.cuh, in front of the .cu
// files that name it
//
// A warp adds a (16,K) b (K,8) to c (16,8), sums in float32: K = 8 floats rounded to TF32, or 16 bf16. A word is a float
// or two bf16, the even one in its low half, so that in words both are a (16,8), b (8,8). Lane 4g + t holds
//
//     a[0] row g, word t    a[1] row g+8, word t    a[2] row g, word t+4    a[3] row g+8, word t+4
//     b0   word t of column g                       b1   word t+4 of column g
//     c[0] (g, 2t)          c[1] (g, 2t+1)          c[2] (g+8, 2t)          c[3] (g+8, 2t+1)
//
// The sum may run over K in any order that is the same for a and b: a kernel chooses which element is word t and which
// is word t+4. All 32 lanes take part.
//
// float on tensor cores, versions:
//   v1 operands as they are           mma ignores the lower 13 bits: off by up to 2^-10, always towards zero
//   v2 rounded to nearest (TF32)      off by up to 2^-11, to both sides
//   v3 high and low part, 3 products  off by up to 2^-20: float32's accuracy at a third of the rate (3xTF32)
//
// Before sm_80, and where g++ compiles this, the same by shuffles and plain copies.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define TENSOR_CORES 1
#else
#define TENSOR_CORES 0
#endif

// older GPUs, which launchers do not give kernels for tensor cores, need not compile the fallbacks
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FOR_TENSOR_CORES(...)
#else
#define FOR_TENSOR_CORES(...) __VA_ARGS__
#endif

// --- operands --------------------------------------------------------------------------------------------------------

// to nearest, ties away from zero
__device__ __forceinline__ unsigned to_tf32(float x) {
#if TENSOR_CORES
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
#else
    const unsigned bits = __float_as_uint(x);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : (bits + 0x1000u) & 0xffffe000u;
#endif
}

// x = high + low, exactly; without EXACT high is x, rounded, and there is no low part
struct Tf32 {
    unsigned high, low;
};

// of EXACT parts mma drops the lower 13 bits: of low that is two bits at most, 2^-21 of x. Rounding high and low would
// take seven operations in place of two, and a kernel splits a value as often as its warps read it
template <bool EXACT> __device__ __forceinline__ Tf32 split_tf32(float x) {
    if (!EXACT) { return {to_tf32(x), 0u}; }
    const unsigned high = __float_as_uint(x) & 0xffffe000u;
    return {high, __float_as_uint(x - __uint_as_float(high))};
}

// a float of memory as it is kept, and what was kept as an operand: rounded once, or split at each use
template <bool EXACT> __device__ __forceinline__ float kept(float x) {
    return EXACT ? x : __uint_as_float(to_tf32(x));
}
template <bool EXACT> __device__ __forceinline__ Tf32 operand(float x) {
    if (EXACT) { return split_tf32<true>(x); }
    return {__float_as_uint(x), 0u};
}

// what is computed of x will be computed again, not kept in registers from one turn of a loop to the next
__device__ __forceinline__ void forget([[maybe_unused]] Pack<4>& x) {
#if TENSOR_CORES
    asm volatile("" : "+f"(x.at[0]), "+f"(x.at[1]), "+f"(x.at[2]), "+f"(x.at[3]));
#endif
}

// two floats as a word of bf16; to nearest, ties to even
__device__ __forceinline__ unsigned pack_bf16(float even, float odd) {
#if TENSOR_CORES
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(odd), "f"(even));
    return word;
#else
    unsigned half[2] = {__float_as_uint(even), __float_as_uint(odd)};
    for (int i = 0; i < 2; i++) {
        const bool nan = (half[i] & 0x7fffffffu) > 0x7f800000u;
        half[i] = nan ? 0x7fffu : (half[i] + 0x7fffu + (half[i] >> 16 & 1u)) >> 16;
    }
    return half[0] | half[1] << 16;
#endif
}

__device__ __forceinline__ float even_bf16(unsigned word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float odd_bf16(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

// --- products --------------------------------------------------------------------------------------------------------

// two words travel together, so that a product takes 16 shuffles. Not inlined: g++ would take twice as long
template <bool BF16>
__device__ void mma_by_shuffles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    typedef unsigned long long Two;
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const Two first = a[0] | (Two)a[1] << 32, second = a[2] | (Two)a[3] << 32, both = b0 | (Two)b1 << 32;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int from = 0; from < 4; from++) {  // words from and from + 4 of both rows and both columns of this lane
        const Two rows[2] = {__shfl_sync(ALL_LANES, first, 4 * g + from), __shfl_sync(ALL_LANES, second, 4 * g + from)};
        const Two columns[2] = {__shfl_sync(ALL_LANES, both, 4 * (2 * t) + from),
                                __shfl_sync(ALL_LANES, both, 4 * (2 * t + 1) + from)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const unsigned x = (unsigned)(rows[k] >> (i / 2 * 32)), y = (unsigned)(columns[i % 2] >> (k * 32));
                if (BF16) {
                    sums[i] += even_bf16(x) * even_bf16(y) + odd_bf16(x) * odd_bf16(y);
                } else {
                    sums[i] += __uint_as_float(x & 0xffffe000u) * __uint_as_float(y & 0xffffe000u);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) { c[i] += sums[i]; }
}

// words of TF32
__device__ __forceinline__ void mma_tf32(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if TENSOR_CORES
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_by_shuffles<false>(c, a, b0, b1);
#endif
}

// words of two bf16
__device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if TENSOR_CORES
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_by_shuffles<true>(c, a, b0, b1);
#endif
}

// floats: TF32, or 3xTF32 if EXACT, where the small products come first and low times low is left out
template <bool EXACT>
__device__ __forceinline__ void mma(float (&c)[4], const Tf32 (&a)[4], Tf32 b0, Tf32 b1) {
    const unsigned high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    if (EXACT) {
        const unsigned low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
        mma_tf32(c, low, b0.high, b1.high);
        mma_tf32(c, high, b0.low, b1.low);
    }
    mma_tf32(c, high, b0.high, b1.high);
}

// --- copies ----------------------------------------------------------------------------------------------------------

// BYTES = 4 or 16 from global to shared memory, both aligned to as many; zeros, and nothing is read, unless `wanted`
template <int BYTES> __device__ __forceinline__ void copy_later(void* to, const void* from, bool wanted) {
    static_assert(BYTES == 4 || BYTES == 16, "the sizes that are used");
#if TENSOR_CORES
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int read = wanted ? BYTES : 0;
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(read) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(read) : "memory");
    }
#else
    const Pack<BYTES / 4> x = wanted ? *static_cast<const Pack<BYTES / 4>*>(from) : zeros<BYTES / 4>();
    *static_cast<Pack<BYTES / 4>*>(to) = x;
#endif
}

// closes a group of this thread's copies
__device__ __forceinline__ void commit_copies() {
#if TENSOR_CORES
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// until all but the latest GROUPS groups of this thread have arrived; a barrier tells the others
template <int GROUPS> __device__ __forceinline__ void wait_for_copies() {
#if TENSOR_CORES
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}
