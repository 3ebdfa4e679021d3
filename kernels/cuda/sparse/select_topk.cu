// select_topk.cu: the positions of a row's highest scores, ascending (kernels/cpu/sparse/select_topk.py)
//
//   v1 sort every row                 all places are found where one, that of the n-th, is needed
//   v2 one block a row                the n-th highest by its digits: 4 histograms of 8 bits, each of what shares the
//                                     digits found so far; then one pass that writes what is above, and of equals the
//                                     last ones. Each pass reads the row again, and most scores meet in a few bins of
//                                     the first histogram, one after another
//   v3 the row in registers (this)    read once, up to 8192 keys. Digits of 11 bits: the first tells quarters of an
//                                     octave apart, and the others come only where a bin is not wanted as a whole. A
//                                     warp has neighbouring keys, so it takes two barriers to know how many are chosen
//                                     in front of them: topk.cuh
//
// A row that keeps all its keys is not looked at.

// index (B,Tq,K), count (B,Tq) at rows first - start .. from scores (B,R,S), keep (B,Tq); a block for each of B * R
// rows, of a power of 2 of threads, 32 or more
extern "C" __global__ void __launch_bounds__(512)
select_topk_kernel(int* __restrict__ index, int* __restrict__ count, const float* __restrict__ scores,
                   const int* __restrict__ keep, int R, int S, int Tq, int K, int first, int start, int force_self,
                   int sink, int leak) {
    const int t = first + blockIdx.x % R;
    const size_t out = (size_t)(blockIdx.x / R) * Tq + t - start;
    const float* row = scores + (size_t)blockIdx.x * S;
    index += out * K;

    const int wanted = max(1, min(keep[out], K));
    const int n = leak ? wanted : min(wanted, t + 1);
    if (threadIdx.x == 0) { count[out] = n; }
    for (int j = n + threadIdx.x; j < K; j += blockDim.x) { index[j] = -1; }
    if (n >= t + 1) {  // all keys, and with the leak those of the future that fill the list
        for (int j = threadIdx.x; j < n; j += blockDim.x) { index[j] = j; }
        return;
    }
    write_highest(index, row, t, n, force_self, sink);
}
