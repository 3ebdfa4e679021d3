// cuda_emulator.h: what a .cu file sees when g++ compiles it for the processor
//
// The words of CUDA C++ that fp32 kernels use, as macros and small functions over the few of scheduler.cpp. build.py
// puts this in front of the file and turns its __shared__ declarations into the macros EMULATOR_SHARED and
// EMULATOR_DYNAMIC_SHARED. With EMULATOR_CHECK, g++ reports every load and store of the file to checker.cpp.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// ---- vector types

struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct int3 { int x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) double2 { double x, y; };

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// ---- what the scheduler offers

namespace emulator {

// an array that the kernel got as an argument
struct Argument {
    const char* name;
    const char* type;  // of an element
    void* begin;
    uint64_t bytes;
    uint64_t element_bytes;
};

enum class Schedule : int32_t { ascending, descending, random };

// one launch; runtime.py has the same structure
struct Launch {
    const char* kernel;
    void** values;              // addresses of the kernel's arguments
    const Argument* arguments;  // those that are arrays
    char* error;                // room for ERROR_BYTES; "" when all went well
    uint64_t shared_bytes;      // dynamic shared memory
    uint64_t shared_limit;      // static and dynamic
    uint64_t seed;
    uint3 grid, block;
    int32_t argument_count;
    Schedule schedule;
    int32_t workers;            // at most so many blocks at a time
    int32_t refused;            // the error is one of the launch, not of the kernel
};

// a __shared__ declaration; its address says which one it is
struct SharedArray {
    const char* name;
    const char* type;  // of an element
    size_t element_bytes, bytes, alignment;
};

// where the running CUDA thread is in its grid
struct Position {
    uint3 thread, block, block_size, grid_size;
    int thread_number;  // in its block
};

enum class Collective : uint32_t { shuffle, ballot, any, all, sync, active };

void run(Launch* launch, void (*call_kernel)(void** values));
void* shared_memory(const SharedArray* array);
void* dynamic_shared_memory(const char* name, const char* type, size_t element_bytes);
int syncthreads(bool predicate, int line);  // number of threads whose predicate held
uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int source_lane);

#ifdef EMULATOR_CHECK
// functions of checker.cpp, which is not reported to itself
uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();
int lane();
void note_atomic(const void* address, size_t bytes, const void* place);
#else
// blocks run in several threads of the operating system, and a CUDA thread stays in the one it started in
extern __thread Position position __attribute__((tls_model("initial-exec")));
inline uint3 thread_index() { return position.thread; }
inline uint3 block_index() { return position.block; }
inline uint3 block_size() { return position.block_size; }
inline uint3 grid_size() { return position.grid_size; }
inline int lane() { return position.thread_number % 32; }
inline void note_atomic(const void*, size_t, const void*) {}
#endif

}  // namespace emulator

// ---- keywords

#ifdef EMULATOR_CHECK
#define EMULATOR_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
#define __global__ __attribute__((noinline))  // or it would become part of its caller, which is unchecked
#else
#define EMULATOR_UNCHECKED
#define __global__
#endif
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// the type comes last since it may have commas
#define EMULATOR_SHARED(name, extents, alignment, ...)                                                              \
    typedef __VA_ARGS__ name##_element;                                                                             \
    typedef name##_element name##_array extents;                                                                    \
    static constexpr emulator::SharedArray name##_shared = {#name, #__VA_ARGS__, sizeof(name##_element),            \
                                                            sizeof(name##_array),                                   \
                                                            alignment ? alignment : alignof(name##_element)};       \
    name##_array& name = *static_cast<name##_array*>(emulator::shared_memory(&name##_shared))

#define EMULATOR_DYNAMIC_SHARED(name, ...)                                                                          \
    __VA_ARGS__* const name = static_cast<__VA_ARGS__*>(                                                            \
        emulator::dynamic_shared_memory(#name, #__VA_ARGS__, sizeof(__VA_ARGS__)))

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
#define warpSize 32

// ---- block and warp

// the line tells one barrier from another
inline void __syncthreads(int line = __builtin_LINE()) { emulator::syncthreads(false, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
    return emulator::syncthreads(predicate != 0, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
    return emulator::syncthreads(predicate != 0, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
    return emulator::syncthreads(predicate == 0, line) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::collective(emulator::Collective::sync, mask, 0, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return static_cast<unsigned>(emulator::collective(emulator::Collective::ballot, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) {
    return static_cast<int>(emulator::collective(emulator::Collective::any, mask, predicate != 0, 0));
}
inline int __all_sync(unsigned mask, int predicate) {
    return static_cast<int>(emulator::collective(emulator::Collective::all, mask, predicate != 0, 0));
}
// the lanes that have not left the kernel, as if the warp had just converged
inline unsigned __activemask() {
    return static_cast<unsigned>(emulator::collective(emulator::Collective::active, 0xffffffffu, 0, 0));
}

template <class T>
inline T emulator_shuffle(unsigned mask, T value, int source_lane) {
    static_assert(sizeof(T) <= 8, "a shuffle takes at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = emulator::collective(emulator::Collective::shuffle, mask, bits, source_lane);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

// a lane whose source is outside its group of `width` lanes keeps its own value
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int first = emulator::lane() & ~(width - 1);
    return emulator_shuffle(mask, value, first + (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = emulator::lane(), source = lane ^ bits;
    return emulator_shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
    return emulator_shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
    return emulator_shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source);
}

// ---- atomics

template <class T, class Update>
EMULATOR_UNCHECKED T emulator_atomic(T* address, Update update) {
    emulator::note_atomic(address, sizeof(T), __builtin_return_address(0));
    T old, updated;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do {
        updated = update(old);
    } while (!__atomic_compare_exchange(address, &old, &updated, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

// the value's type follows the address's, as with CUDA's overloads
template <class T> struct emulator_same { using type = T; };
template <class T> using emulator_value = typename emulator_same<T>::type;

template <class T> inline T atomicAdd(T* address, emulator_value<T> value) {
    return emulator_atomic(address, [value](T old) { return T(old + value); });
}
template <class T> inline T atomicSub(T* address, emulator_value<T> value) {
    return emulator_atomic(address, [value](T old) { return T(old - value); });
}
template <class T> inline T atomicMax(T* address, emulator_value<T> value) {
    return emulator_atomic(address, [value](T old) { return old > value ? old : value; });
}
template <class T> inline T atomicMin(T* address, emulator_value<T> value) {
    return emulator_atomic(address, [value](T old) { return old < value ? old : value; });
}
template <class T> inline T atomicAnd(T* address, emulator_value<T> value) {
    return emulator_atomic(address, [value](T old) { return T(old & value); });
}
template <class T> inline T atomicOr(T* address, emulator_value<T> value) {
    return emulator_atomic(address, [value](T old) { return T(old | value); });
}
template <class T> inline T atomicExch(T* address, emulator_value<T> value) {
    return emulator_atomic(address, [value](T) { return value; });
}
template <class T> inline T atomicCAS(T* address, emulator_value<T> compare, emulator_value<T> value) {
    return emulator_atomic(address, [compare, value](T old) { return old == compare ? value : old; });
}

// ---- arithmetic; the rest is in cmath under the same names

// macros, since the C library declares functions of these names
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
using std::isfinite;
using std::isinf;
using std::isnan;

inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
inline size_t min(size_t a, size_t b) { return a < b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
inline size_t max(size_t a, size_t b) { return a > b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }

template <class To, class From>
inline To emulator_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}
inline float __int_as_float(int bits) { return emulator_bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return emulator_bits<float>(bits); }
inline int __float_as_int(float value) { return emulator_bits<int>(value); }
inline unsigned __float_as_uint(float value) { return emulator_bits<unsigned>(value); }
inline int __float2int_rn(float value) { return static_cast<int>(rintf(value)); }
inline int __float2int_rd(float value) { return static_cast<int>(floorf(value)); }
inline int __float2int_rz(float value) { return static_cast<int>(value); }

// ---- cache hints

template <class T> inline T __ldg(const T* address) { return *address; }
template <class T> inline T __ldcs(const T* address) { return *address; }
template <class T> inline T __ldcg(const T* address) { return *address; }
template <class T> inline T __ldca(const T* address) { return *address; }
template <class T> inline void __stcs(T* address, emulator_value<T> value) { *address = value; }
template <class T> inline void __stcg(T* address, emulator_value<T> value) { *address = value; }
