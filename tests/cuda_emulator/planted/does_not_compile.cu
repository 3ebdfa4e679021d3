// does_not_compile.cu: the message must say where
extern "C" __global__ void __launch_bounds__(32)
misspelt(float* out) {
    out[threadIdx.x] = 1.0f;
    __syncthreadz();
}
