// torus_rope.cu: rotary position embedding on a torus, q and k in place, and back (kernels/cpu/torus/torus_rope.py)
//
//   v1 a thread a pair                         the angle again for each head, in q and in k
//   v2 a thread a pair of all heads (this)     one angle for q and k of a token: they are 2 NH heads side by side

// turns * n / period without its whole rounds, turns being a float: exact but for the division if turns is whole
__device__ __forceinline__ double part_of_a_round(int n, float turns, int period) {
    const double way = (double)n * turns;
    return fma(-rint(way / period), (double)period, way) / period;
}

// qkv (N,3*NH*D*hd), row n being at position start + n % T; pair i of platter k turns by (position / P) w[i] + (k / D)
// f[i] rounds, backwards if back is 1. a thread for each of N * D * hd / 2 pairs
extern "C" __global__ void __launch_bounds__(256)
torus_rope_kernel(float* __restrict__ qkv, const float* __restrict__ w, const float* __restrict__ f, int N, int T,
                  int NH, int D, int hd, int P, int start, int back) {
    const int pairs = D * hd / 2;
    const size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= (size_t)N * pairs) { return; }
    const int n = thread / pairs;
    const int pair = thread % pairs;
    const int platter = pair / (hd / 2), i = pair % (hd / 2);
    // in double until whole rounds are gone, as in rotation()
    const double rounds = part_of_a_round(start + n % T, w[i], P) + part_of_a_round(platter, f[i], D);
    Rotation r;
    sincosf(6.2831853f * (float)(rounds - rint(rounds)), &r.sine, &r.cosine);
    if (back) { r.sine = -r.sine; }
    float* x = qkv + (size_t)n * 3 * NH * D * hd + 2 * pair;
    if (((size_t)x & 7) == 0) {  // hd is even: so are all steps
        rotate_heads<2>(x, r, 2 * NH, D * hd);
    } else {
        rotate_heads<1>(x, r, 2 * NH, D * hd);
    }
}
