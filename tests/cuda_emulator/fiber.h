// fiber.h: a stack of its own for a CUDA thread that blocks, and the change from one stack to another
//
// x86-64: a few instructions. Elsewhere, or with EMULATOR_UCONTEXT: the C library's ucontext, whose change is a
// system call: a barrier takes 25 times as long.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT
#endif
#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK_BYTES = 512 << 10;  // frames grow by their red zones
#else
constexpr size_t STACK_BYTES = 128 << 10;  // build.py refuses a function that wants more than a quarter
#endif
constexpr size_t PAGE_BYTES = 4096;
// stacks that all begin at a page's start would share a few sets of the cache: each begins a little deeper
constexpr size_t COLOUR_STEP = 448, COLOURS = 36;

class Fiber {
public:
    Fiber() = default;  // the stack of the operating system's thread
    explicit Fiber(size_t number) : colour_((number % COLOURS) * COLOUR_STEP) {
        stack_ = static_cast<char*>(std::aligned_alloc(PAGE_BYTES, STACK_BYTES));
        if (!stack_) throw std::bad_alloc();
    }
    ~Fiber() { std::free(stack_); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    void begin_at(void (*entry)());  // the next change to this fiber calls entry, which must not return
    void change_to(Fiber& other);    // returns when somebody changes back
    bool has(const void* address) const {
        return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(stack_) < STACK_BYTES;
    }
    static void arrived();           // entry calls it first

private:
    void switch_to(Fiber& other);
    void forget_frames();            // of what ran here before and never returned

    char* stack_ = nullptr;
    size_t colour_ = 0;
#ifdef EMULATOR_UCONTEXT
    ucontext_t context_;
#else
    void* stack_pointer_ = nullptr;
#endif
};

// ---- the change itself

#ifdef EMULATOR_UCONTEXT

inline void Fiber::begin_at(void (*entry)()) {
    forget_frames();
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = STACK_BYTES - colour_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
}

inline void Fiber::switch_to(Fiber& other) { swapcontext(&context_, &other.context_); }

#else

// saves the registers that a call preserves and the stack pointer, takes the other's. it ends in a return, not in a
// jump: lanes of a warp wait at the same place, so the processor's guess where calls return to stays right
__attribute__((naked, noinline)) inline void switch_stack(void**, void*) {
    asm(R"(
        pushq %rbp
        pushq %rbx
        pushq %r12
        pushq %r13
        pushq %r14
        pushq %r15
        movq %rsp, (%rdi)
        movq %rsi, %rsp
        popq %r15
        popq %r14
        popq %r13
        popq %r12
        popq %rbx
        popq %rbp
        ret
    )");
}

inline void Fiber::begin_at(void (*entry)()) {
    constexpr int SAVED_REGISTERS = 6;
    forget_frames();
    void** top = reinterpret_cast<void**>(stack_ + STACK_BYTES - colour_);
    *--top = nullptr;  // where entry would return to; aligns the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < SAVED_REGISTERS; i++) *--top = nullptr;
    stack_pointer_ = top;
}

inline void Fiber::switch_to(Fiber& other) { switch_stack(&stack_pointer_, other.stack_pointer_); }

#endif

// ---- what the address sanitizer wants to know

#ifdef __SANITIZE_ADDRESS__

inline void Fiber::forget_frames() { __asan_unpoison_memory_region(stack_, STACK_BYTES); }

static thread_local const void* system_stack = nullptr;  // of the operating system's thread, learnt at the first change
static thread_local size_t system_stack_bytes = 0;

inline void Fiber::change_to(Fiber& other) {
    void* kept;
    __sanitizer_start_switch_fiber(&kept, other.stack_ ? other.stack_ : system_stack,
                                   other.stack_ ? STACK_BYTES : system_stack_bytes);
    switch_to(other);
    __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
}

inline void Fiber::arrived() {
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!system_stack) {
        system_stack = bottom;
        system_stack_bytes = bytes;
    }
}

#else

inline void Fiber::change_to(Fiber& other) { switch_to(other); }
inline void Fiber::arrived() {}
inline void Fiber::forget_frames() {}

#endif

}  // namespace emulator
