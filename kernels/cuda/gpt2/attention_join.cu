// attention_join.cu: joins what blocks found of one query, each over a part of its keys
//
// A part has its largest score `top`, in powers of two, the sum of 2^(score - top), and the values weighted by these; of
// no keys that is -inf, 0 and 0. Parts are joined in their order: the bits hang on sizes alone.

// out (rows,columns) and lse from part_sums (parts,rows,columns), part_softmax (parts,rows,2: top, sum). A row is
// (b,t,h), as in out (B,n,NH,columns); lse is (B,NH,n). A block a row
extern "C" __global__ void __launch_bounds__(256)
attention_join_kernel(float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ part_sums,
                      const float* __restrict__ part_softmax, int rows, int columns, int parts, int NH, int n) {
    const size_t row = blockIdx.x;
    float top = MINUS_INFINITY;
#pragma unroll 8  // loads in flight: a single query has few rows, and up to 128 parts of them
    for (int part = 0; part < parts; part++) { top = fmaxf(top, part_softmax[2 * ((size_t)part * rows + row)]); }
    float total = 0.0f;
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        float result = 0.0f;
        total = 0.0f;
#pragma unroll 8
        for (int part = 0; part < parts; part++) {
            const size_t at = (size_t)part * rows + row;
            const float weight = exp2f(part_softmax[2 * at] - top);
            total += weight * part_softmax[2 * at + 1];
            result += weight * part_sums[at * columns + column];
        }
        out[row * columns + column] = result / total;
    }
    const size_t b = row / NH / n, t = row / NH % n, h = row % NH;
    if (threadIdx.x == 0) { lse[(b * NH + h) * n + t] = LN2 * (top + log2f(total)); }
}
