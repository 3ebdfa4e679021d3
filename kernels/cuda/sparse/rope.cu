// rope.cu: rotary position embedding in place, and its transpose (kernels/cpu/sparse/rope.py)
//
//   v1 a thread a pair                      the angle again for each head
//   v2 a thread a pair in all heads (this)  one angle; loads of several heads in flight; neighbouring lanes take
//                                           neighbouring pairs, 8 bytes each

// x (N,heads*width): the first `rotated` columns of each head, row n being at position start + n % T; by the negative
// angle if back is 1. a thread for each of N * rotated / 2 pairs
extern "C" __global__ void __launch_bounds__(256)
rope_kernel(float* __restrict__ x, int N, int T, int heads, int width, int rotated, int start, int back) {
    const int pairs = rotated / 2;
    const size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= (size_t)N * pairs) { return; }
    const int n = thread / pairs;
    const int pair = thread % pairs;
    Rotation r = rotation(start + n % T, pair, rotated);
    if (back) { r.sine = -r.sine; }
    x += (size_t)n * heads * width + 2 * pair;
    if (width % 2 == 0 && ((size_t)x & 7) == 0) {
        rotate_heads<2>(x, r, heads, width);
    } else {
        rotate_heads<1>(x, r, heads, width);
    }
}
