// unreadable_shared.cu: shared memory declared as the emulator cannot read it
extern "C" __global__ void __launch_bounds__(32)
unreadable(float* out) {
    __shared__ struct { float x; } values[32];
    values[threadIdx.x].x = 1.0f;
    out[threadIdx.x] = values[threadIdx.x].x;
}
