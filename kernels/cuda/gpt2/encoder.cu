// encoder.cu: token plus position embedding and its gradients (kernels/cpu/gpt2/encoder.py)
//
// encoder_forward_kernel: one warp a token, float4
// encoder_backward_wte_kernel: dwte rows of repeated tokens are sums whose order must not depend on scheduling
//   v1 atomicAdd a value         order of the threads' arrival: other bits every run
//   v2 one block a token (this)  the block of a token's first position adds up all its positions, in their order; the
//                                others leave. 4 N^2 bytes of token ids are compared, out of the cache; dout is read once
// encoder_backward_wpe_kernel: one thread a pack of dwpe, over the batch in order

// out (N,C) = wte[inp] + wpe[start + *further + position]; N = B*T. a token id outside 0..Vp-1 gives a row of NaN
template <int W>
__device__ __forceinline__ void encode(float* out, int token, const float* wte, const float* wpe, size_t n, int t,
                                       int C, int Vp) {
    const int packs = C / W;
    const bool known = token >= 0 && token < Vp;
    for (int i = threadIdx.x % WARP; i < packs; i += WARP) {
        Pack<W> x = load<W>(wpe, (size_t)t * packs + i);
        if (known) {
            add(x, load<W>(wte, (size_t)token * packs + i));
        } else {
            for (int j = 0; j < W; j++) { x.at[j] = nanf(""); }
        }
        store<W>(out, n * packs + i, x);
    }
}

extern "C" __global__ void __launch_bounds__(256)
encoder_forward_kernel(float* __restrict__ out, const int* __restrict__ inp, const float* __restrict__ wte,
                       const float* __restrict__ wpe, int N, int T, int C, int Vp, int start,
                       const int* __restrict__ further) {
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= N) { return; }
    if (C % 4 == 0 && aligned(out, wte, wpe)) {
        encode<4>(out, inp[n], wte, wpe, n, start + *further + n % T, C, Vp);
    } else {
        encode<1>(out, inp[n], wte, wpe, n, start + *further + n % T, C, Vp);
    }
}

// whether any thread of the block says so; `shared` as for block_sum
__device__ __forceinline__ bool block_any(bool mine, int* shared) {
    const int any = __any_sync(ALL_LANES, mine);
    if (threadIdx.x % WARP == 0) { shared[threadIdx.x / WARP] = any; }
    __syncthreads();
    bool found = false;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) { found = found || shared[warp]; }
    return found;
}

// dwte[token] += the rows of dout of all positions from `first` on that hold it, one pack of columns a thread
template <int W>
__device__ __forceinline__ void add_rows(float* dwte, const float* dout, const int* inp, int first, int token,
                                         unsigned* matches, int N, int C) {
    const int packs = C / W;
    for (int base = blockIdx.y * blockDim.x; base < packs; base += gridDim.y * blockDim.x) {
        const int pack = base + threadIdx.x;
        const bool mine = pack < packs;
        Pack<W> total = mine ? load<W>(dwte, (size_t)token * packs + pack) : zeros<W>();
        for (int chunk = first; chunk < N; chunk += blockDim.x) {
            const int n = chunk + threadIdx.x;
            const unsigned lanes = __ballot_sync(ALL_LANES, n < N && inp[n] == token);
            __syncthreads();  // `matches` is no longer read
            if (threadIdx.x % WARP == 0) { matches[threadIdx.x / WARP] = lanes; }
            __syncthreads();
            for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) {
                for (unsigned left = matches[warp]; left != 0; left &= left - 1) {
                    const int row = chunk + warp * WARP + __ffs(left) - 1;
                    if (mine) { add(total, load<W>(dout, (size_t)row * packs + pack)); }
                }
            }
        }
        if (mine) { store<W>(dwte, (size_t)token * packs + pack, total); }
    }
}

// dwte (Vp,C) += ... from dout (N,C) and inp (N); grid (N, about C / 4 / threads), whole warps
extern "C" __global__ void __launch_bounds__(256)
encoder_backward_wte_kernel(float* __restrict__ dwte, const float* __restrict__ dout, const int* __restrict__ inp,
                            int N, int C, int Vp) {
    __shared__ int flags[256 / WARP];
    __shared__ unsigned matches[256 / WARP];
    const int first = blockIdx.x;
    const int token = inp[first];
    bool earlier = token < 0 || token >= Vp;
    for (int n = threadIdx.x; n < first && !earlier; n += blockDim.x) { earlier = inp[n] == token; }
    if (block_any(earlier, flags)) { return; }
    if (C % 4 == 0 && aligned(dwte, dout)) {
        add_rows<4>(dwte, dout, inp, first, token, matches, N, C);
    } else {
        add_rows<1>(dwte, dout, inp, first, token, matches, N, C);
    }
}

// dwpe (T,C) += the sum over the batch of dout (B,T,C)
template <int W>
__device__ __forceinline__ void add_batch(float* dwpe, const float* dout, size_t n, int B) {
    const size_t packs = n / W;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < packs; i += (size_t)gridDim.x * blockDim.x) {
        Pack<W> total = load<W>(dwpe, i);
        for (int b = 0; b < B; b++) { add(total, load<W>(dout, b * packs + i)); }
        store<W>(dwpe, i, total);
    }
}

extern "C" __global__ void __launch_bounds__(256)
encoder_backward_wpe_kernel(float* __restrict__ dwpe, const float* __restrict__ dout, int B, int T, int C) {
    const size_t n = (size_t)T * C;
    if (n % 4 == 0 && aligned(dwpe, dout)) {
        add_batch<4>(dwpe, dout, n, B);
    } else {
        add_batch<1>(dwpe, dout, n, B);
    }
}
