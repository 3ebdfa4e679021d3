// scheduler.h: a block of CUDA threads as scheduler.cpp runs it and checker.cpp looks at it
#pragma once
#include <cstdarg>
#include <memory>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "fiber.h"

// names for kernels, not for what runs them
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#undef warpSize

namespace emulator {

#ifdef EMULATOR_CHECK
constexpr bool CHECKS = true;
constexpr size_t SHARED_GAP = 1024;  // between shared arrays, where an overrun shows
#else
constexpr bool CHECKS = false;
constexpr size_t SHARED_GAP = 0;
#endif
constexpr int WARP_LANES = 32;
constexpr unsigned MAX_THREADS = 1024;       // of a block
constexpr size_t ERROR_BYTES = 2000;         // as in runtime.py
constexpr size_t STATIC_LIMIT = 48 << 10;    // of shared memory, whatever a kernel asks for
constexpr size_t ARENA_BYTES = 512 << 10;    // what the largest GPU gives to one that asks, and the gaps

struct Thread {
    uint3 index;
    Fiber* fiber;
    const void* place;  // of the call it waits in
};

struct Warp {
    uint32_t live = 0;     // lanes that have not left the kernel
    uint32_t arrived = 0;  // lanes that wait in a collective
    // of the lanes that wait
    uint64_t ticket[WARP_LANES];  // which collective and mask
    uint64_t value[WARP_LANES];
    uint8_t source[WARP_LANES];   // the lane to shuffle from
    // for lanes that may go on
    uint64_t result[WARP_LANES];
};

// threads in a row: first in, first out. no thread is in it twice
class Queue {
public:
    bool empty() const { return head_ == tail_; }
    unsigned size() const { return tail_ - head_; }
    int front() const { return threads_[head_ % MAX_THREADS]; }
    void push(int thread) { threads_[tail_++ % MAX_THREADS] = thread; }
    void push_at(unsigned place, int thread) {
        push(thread);
        std::swap(threads_[(tail_ - 1) % MAX_THREADS], threads_[(head_ + place) % MAX_THREADS]);
    }
    int pop() { return threads_[head_++ % MAX_THREADS]; }
    void clear() { head_ = tail_ = 0; }

private:
    std::unique_ptr<int[]> threads_ = std::make_unique<int[]>(MAX_THREADS);
    unsigned head_ = 0, tail_ = 0;
};

class Block {
public:
    void begin_launch(const Launch& launch, void (*call_kernel)(void**));
    void run(uint64_t number);
    // ends the launch; called by a CUDA thread
    [[noreturn]] void fail(const std::string& message, bool refused = false);

    // what kernels call
    int syncthreads(bool predicate, int line, const void* place);
    uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int source_lane, const void* place);
    void* shared_memory(const SharedArray& array);
    void* dynamic_shared_memory(const char* name, const char* type, size_t element_bytes);

    uint64_t number() const { return number_; }
    const Fiber& running() const { return *running_; }
    std::string thread_text(int thread) const;  // "thread 5 of block 0"
    std::string block_text(uint64_t number) const;

private:
    static void fiber_main();
    void fiber_loop();
    void reset();
    void finish(int thread);
    void start_next_thread();
    void wait();
    void make_current(int thread);
    void change_to(Fiber& fiber);
    Fiber& free_fiber();
    Queue* next_queue();
    void release(Queue& queue, int thread);
    uint64_t random();
    void open_barrier();
    bool complete(int warp, uint64_t ticket, int caller);
    bool sources_take_part(const Warp& warp, uint32_t lanes) const;
    void compute_results(Warp& warp, Collective kind, uint32_t lanes);
    void release_lanes(int warp, uint32_t lanes, int caller);
    char* take_shared(size_t bytes, size_t alignment);

    // out of the way, since what waits on its stack should be small
#define COLD [[noreturn, gnu::cold, gnu::noinline]] void
    COLD fail_left_early(int thread);
    COLD fail_barrier_without_all();
    COLD fail_divergent_barrier();
    COLD fail_outside_mask(Collective kind, uint32_t mask);
    COLD fail_divergent_collective(int warp, uint64_t ticket, uint32_t lanes);
    COLD fail_source(int warp, uint32_t lanes);
#undef COLD
    std::string deadlock_text() const;

    const Launch* launch_ = nullptr;
    void (*call_kernel_)(void**) = nullptr;
    uint64_t number_ = 0, random_state_ = 1;
    bool at_random_ = false;

    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<int> order_;  // in which threads start
    int next_ = 0;            // first of order_ that has not started
    int finished_ = 0;
    bool failed_ = false;

    Queue barrier_;   // threads that wait for the rest of the block
    int barrier_line_ = 0, barrier_sum_ = 0, barrier_result_ = 0;
    Queue warm_;      // may go on after a warp's collective: their stacks are in the cache
    Queue passed_;    // may go on after a barrier

    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Fiber*> free_fibers_;
    Fiber system_fiber_;
    Fiber* running_ = &system_fiber_;

    std::unique_ptr<char[]> arena_;
    size_t arena_used_ = 0, shared_bytes_ = 0, static_bytes_ = 0;
    char* dynamic_shared_ = nullptr;
    std::vector<std::pair<const SharedArray*, char*>> shared_;
#ifdef __SANITIZE_ADDRESS__
    std::vector<std::unique_ptr<char[]>> allocations_;  // one for each shared array, so that its ends are seen
#endif
};

#define INITIAL_EXEC __attribute__((tls_model("initial-exec")))  // no call for each use
extern __thread Block* current_block INITIAL_EXEC;
extern __thread Position position INITIAL_EXEC;

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string place_text(const void* return_address);  // " [0x1234]", which runtime.py turns into a file and a line

// only with EMULATOR_CHECK
namespace checker {
void begin_launch(const Launch& launch);
void begin_block(uint64_t number);
void add_shared(const char* name, const char* type, size_t element_bytes, const void* begin, size_t bytes);
void barrier();                           // all threads of the block have come to it
void warp_sync(int warp, uint32_t lanes);  // the lanes have come to a __syncwarp
}  // namespace checker

extern uintptr_t module_base;  // where the kernel's library begins

}  // namespace emulator
