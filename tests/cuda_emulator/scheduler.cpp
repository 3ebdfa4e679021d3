// scheduler.cpp: runs the blocks of a launch, each of its CUDA threads on a fiber as soon as it has to wait
//
// A fiber takes threads one after another; a thread that never waits is a plain call. One that waits keeps its fiber,
// and another fiber runs what comes next: a thread that may go on, or one that has not started. The last lane to come
// to a collective computes the results of all its lanes.
#include "scheduler.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <numeric>
#include <thread>

namespace emulator {

__thread Position position INITIAL_EXEC;
__thread Block* current_block INITIAL_EXEC;
uintptr_t module_base;

static Launch* current_launch;  // one at a time: runtime.py sees to it
static std::atomic<bool> launch_failed;
static std::mutex error_lock;

// ---- messages

std::string text(const char* format, ...) {
    char line[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

std::string place_text(const void* return_address) {
    if (!return_address) return "";
    return text(" [0x%lx]", static_cast<unsigned long>(reinterpret_cast<uintptr_t>(return_address) - module_base));
}

static std::string index_text(uint64_t number, uint3 size) {
    if (size.y == 1 && size.z == 1) return std::to_string(number);
    const uint64_t x = number % size.x, y = number / size.x % size.y, z = number / size.x / size.y;
    return text("(%lu, %lu, %lu)", x, y, z);
}

std::string Block::block_text(uint64_t number) const { return "block " + index_text(number, launch_->grid); }

std::string Block::thread_text(int thread) const {
    return "thread " + index_text(thread, launch_->block) + " of " + block_text(number_);
}

// the first error of a launch is the one to report
static void report(const std::string& message, bool refused) {
    std::lock_guard<std::mutex> guard(error_lock);
    if (launch_failed) return;
    launch_failed = true;
    current_launch->refused = refused;
    snprintf(current_launch->error, ERROR_BYTES, "%s: %s", current_launch->kernel, message.c_str());
}

void Block::fail(const std::string& message, bool refused) {
    report(message, refused);
    failed_ = true;
    change_to(system_fiber_);  // nobody changes back: the block's threads are abandoned
    std::abort();
}

static const char* name_of(Collective kind) {
    static const char* const names[] = {"__shfl_sync", "__ballot_sync", "__any_sync",
                                        "__all_sync",  "__syncwarp",    "__activemask"};
    return names[static_cast<int>(kind)];
}

// ---- which thread runs next

uint64_t Block::random() {  // xorshift64 (Marsaglia 2003)
    random_state_ ^= random_state_ << 13;
    random_state_ ^= random_state_ >> 7;
    random_state_ ^= random_state_ << 17;
    return random_state_;
}

void Block::release(Queue& queue, int thread) {
    if (at_random_) {
        queue.push_at(random() % (queue.size() + 1), thread);
    } else {
        queue.push(thread);
    }
}

// null: a thread that has not started, or none at all
Queue* Block::next_queue() {
    const bool all_started = next_ == static_cast<int>(threads_.size());
    if (at_random_) {  // any order that the waiting allows
        const uint64_t choice = random();
        if (!all_started && choice & 1) return nullptr;
        if (!warm_.empty() && (passed_.empty() || choice & 2)) return &warm_;
        return passed_.empty() ? nullptr : &passed_;
    }
    if (!warm_.empty()) return &warm_;
    return all_started && !passed_.empty() ? &passed_ : nullptr;
}

inline void Block::make_current(int thread) {
    position.thread = threads_[thread].index;
    position.thread_number = thread;
}

inline void Block::change_to(Fiber& fiber) {
    Fiber& from = *running_;
    running_ = &fiber;
    from.change_to(fiber);
}

Fiber& Block::free_fiber() {
    if (free_fibers_.empty()) {
        fibers_.push_back(std::make_unique<Fiber>(fibers_.size()));
        free_fibers_.push_back(fibers_.back().get());
    }
    Fiber& fiber = *free_fibers_.back();
    free_fibers_.pop_back();
    fiber.begin_at(fiber_main);
    return fiber;
}

// the current thread waits; returns when it may go on
void Block::wait() {
    const int thread = position.thread_number;
    Fiber* next;
    if (Queue* queue = next_queue()) {
        const int released = queue->pop();
        make_current(released);
        if (released == thread) return;
        next = threads_[released].fiber;
    } else if (next_ < static_cast<int>(threads_.size())) {
        next = &free_fiber();
    } else {
        next = &system_fiber_;  // nobody can go on
    }
    change_to(*next);
}

void Block::fiber_main() {
    Fiber::arrived();
    current_block->fiber_loop();
}

void Block::fiber_loop() {
    Fiber* const fiber = running_;
    for (;;) {
        if (Queue* queue = next_queue()) {
            const int released = queue->pop();
            make_current(released);
            free_fibers_.push_back(fiber);
            change_to(*threads_[released].fiber);
        } else if (next_ < static_cast<int>(threads_.size())) {
            start_next_thread();
        } else {
            change_to(system_fiber_);
        }
    }
}

inline void Block::start_next_thread() {
    const int thread = order_[next_++];
    threads_[thread].fiber = running_;
    make_current(thread);
    call_kernel_(launch_->values);
    finish(thread);
}

void Block::finish(int thread) {
    const int warp_number = thread / WARP_LANES;
    Warp& warp = warps_[warp_number];
    finished_++;
    warp.live &= ~(1u << thread % WARP_LANES);
    if (!barrier_.empty()) fail_left_early(thread);
    // lanes may have waited for this one alone
    for (uint32_t lanes = warp.arrived; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        if (warp.arrived >> lane & 1) complete(warp_number, warp.ticket[lane], -1);
    }
}

// ---- barriers

void Block::open_barrier() {
    barrier_result_ = barrier_sum_;
    barrier_sum_ = 0;
    if constexpr (CHECKS) checker::barrier();
    if (at_random_) {
        while (!barrier_.empty()) release(passed_, barrier_.pop());
    } else {
        std::swap(barrier_, passed_);  // nobody is left in passed_: all were waiting
    }
}

int Block::syncthreads(bool predicate, int line, const void* place) {
    const int thread = position.thread_number;
    threads_[thread].place = place;
    if (finished_) fail_barrier_without_all();
    if (barrier_.empty()) barrier_line_ = line;
    if (line != barrier_line_) fail_divergent_barrier();
    barrier_sum_ += predicate;
    barrier_.push(thread);
    if (barrier_.size() == threads_.size()) open_barrier();
    wait();
    return barrier_result_;
}

void Block::fail_left_early(int thread) {
    const int waiting = barrier_.front();
    fail(thread_text(thread) + " leaves the kernel without coming to the __syncthreads" +
         place_text(threads_[waiting].place) + " where " + thread_text(waiting) + " waits");
}

void Block::fail_barrier_without_all() {
    const int thread = position.thread_number;
    fail(thread_text(thread) + " comes to a __syncthreads" + place_text(threads_[thread].place) +
         " that other threads of the block, which have left the kernel, did not come to");
}

void Block::fail_divergent_barrier() {
    const int thread = position.thread_number, waiting = barrier_.front();
    fail("divergent __syncthreads: " + thread_text(thread) + " comes to one" + place_text(threads_[thread].place) +
         " while " + thread_text(waiting) + " waits at another" + place_text(threads_[waiting].place));
}

// ---- collectives of a warp

static uint64_t ticket_of(Collective kind, uint32_t mask) { return static_cast<uint64_t>(kind) << 32 | mask; }
static Collective kind_of(uint64_t ticket) { return static_cast<Collective>(ticket >> 32); }
static uint32_t mask_of(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

uint64_t Block::collective(Collective kind, uint32_t mask, uint64_t value, int source_lane, const void* place) {
    const int thread = position.thread_number, lane = thread % WARP_LANES, warp_number = thread / WARP_LANES;
    Warp& warp = warps_[warp_number];
    threads_[thread].place = place;
    if (!(mask >> lane & 1)) fail_outside_mask(kind, mask);
    warp.ticket[lane] = ticket_of(kind, mask);
    warp.value[lane] = value;
    warp.source[lane] = static_cast<uint8_t>(source_lane);
    warp.arrived |= 1u << lane;
    const uint32_t expected = mask & warp.live;
    if ((warp.arrived & expected) != expected || !complete(warp_number, ticket_of(kind, mask), thread)) wait();
    return warp.result[lane];
}

// lets the lanes of a collective go on if all have come to it; the caller, if one of them, goes on by itself
bool Block::complete(int warp_number, uint64_t ticket, int caller) {
    Warp& warp = warps_[warp_number];
    const uint32_t lanes = mask_of(ticket) & warp.live;
    if ((warp.arrived & lanes) != lanes) return false;
    uint64_t difference = 0;
    for (int lane = 0; lane < WARP_LANES; lane++) {
        difference |= lanes >> lane & 1 ? warp.ticket[lane] ^ ticket : 0;
    }
    if (mask_of(difference)) return false;  // a lane waits with another mask, perhaps for lanes that will still come
    if (difference) fail_divergent_collective(warp_number, ticket, lanes);
    if (kind_of(ticket) == Collective::shuffle && !sources_take_part(warp, lanes)) fail_source(warp_number, lanes);
    if constexpr (CHECKS) {
        if (kind_of(ticket) == Collective::sync) checker::warp_sync(warp_number, lanes);
    }
    compute_results(warp, kind_of(ticket), lanes);
    warp.arrived &= ~lanes;
    release_lanes(warp_number, lanes, caller);
    return true;
}

bool Block::sources_take_part(const Warp& warp, uint32_t lanes) const {
    uint32_t sources = 0;
    for (int lane = 0; lane < WARP_LANES; lane++) {
        sources |= lanes >> lane & 1 ? 1u << warp.source[lane] : 0;
    }
    return !(sources & ~lanes);
}

void Block::compute_results(Warp& warp, Collective kind, uint32_t lanes) {
    if (kind == Collective::shuffle) {
        uint64_t shuffled[WARP_LANES];
        for (int lane = 0; lane < WARP_LANES; lane++) shuffled[lane] = warp.value[warp.source[lane] % WARP_LANES];
        for (int lane = 0; lane < WARP_LANES; lane++) {
            if (lanes >> lane & 1) warp.result[lane] = shuffled[lane];
        }
        return;
    }
    uint32_t ballot = 0;
    for (int lane = 0; lane < WARP_LANES; lane++) ballot |= static_cast<uint32_t>(warp.value[lane] != 0) << lane;
    ballot &= lanes;
    const uint64_t result = kind == Collective::ballot ? ballot
                            : kind == Collective::any  ? ballot != 0
                            : kind == Collective::all  ? ballot == lanes
                                                       : lanes;
    for (int lane = 0; lane < WARP_LANES; lane++) {
        if (lanes >> lane & 1) warp.result[lane] = result;
    }
}

void Block::release_lanes(int warp, uint32_t lanes, int caller) {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        const int thread = warp * WARP_LANES + __builtin_ctz(rest);
        if (thread != caller) release(warm_, thread);
    }
}

void Block::fail_outside_mask(Collective kind, uint32_t mask) {
    const int thread = position.thread_number;
    fail(text("%s of mask 0x%x", name_of(kind), mask) + place_text(threads_[thread].place) + " is called by " +
         thread_text(thread) + text(", lane %d, which the mask leaves out", thread % WARP_LANES));
}

void Block::fail_divergent_collective(int warp_number, uint64_t ticket, uint32_t lanes) {
    const Warp& warp = warps_[warp_number];
    int lane = 0;
    while (!(lanes >> lane & 1) || warp.ticket[lane] == ticket) lane++;
    const int other = warp_number * WARP_LANES + lane, thread = position.thread_number;
    fail("divergent collective: " + thread_text(thread) + " calls " + name_of(kind_of(ticket)) +
         place_text(threads_[thread].place) + " while " + thread_text(other) + " of the same warp waits in " +
         name_of(kind_of(warp.ticket[lane])) + place_text(threads_[other].place));
}

void Block::fail_source(int warp_number, uint32_t lanes) {
    const Warp& warp = warps_[warp_number];
    int lane = 0;
    while (!(lanes >> lane & 1) || lanes >> warp.source[lane] & 1) lane++;
    const int thread = warp_number * WARP_LANES + lane, source = warp.source[lane];
    fail(thread_text(thread) + text(" shuffles from lane %d", source) + place_text(threads_[thread].place) +
         (warp.live >> source & 1 ? ", which is not in the mask" : ", which has left the kernel"));
}

// ---- shared memory

// fills it with the bytes of NaN, so that a value that nobody wrote shows
char* Block::take_shared(size_t bytes, [[maybe_unused]] size_t alignment) {
    shared_bytes_ += bytes;
    if (shared_bytes_ > launch_->shared_limit) {
        const size_t limit = launch_->shared_limit;
        fail(text("static and dynamic shared memory is more than %zu bytes", limit), true);
    }
#ifdef __SANITIZE_ADDRESS__
    allocations_.emplace_back(new char[bytes]);
    char* const begin = allocations_.back().get();
#else
    const size_t step = std::max<size_t>(alignment, 16);
    size_t offset = (arena_used_ + step - 1) / step * step;
    // no better aligned than declared: a float array need not start where a float4 may
    if (CHECKS && alignment < 16) offset += alignment;
    if (offset + bytes > ARENA_BYTES) fail("more shared arrays than the emulator has room for", true);
    char* const begin = arena_.get() + offset;
    arena_used_ = offset + bytes + SHARED_GAP;
#endif
    memset(begin, 0xff, bytes);
    return begin;
}

void* Block::shared_memory(const SharedArray& array) {
    for (const auto& [declared, begin] : shared_) {
        if (declared == &array) return begin;
    }
    static_bytes_ += array.bytes;
    if (static_bytes_ > STATIC_LIMIT) fail(text("static shared memory is more than %zu bytes", STATIC_LIMIT), true);
    char* const begin = take_shared(array.bytes, array.alignment);
    shared_.emplace_back(&array, begin);
    if constexpr (CHECKS) checker::add_shared(array.name, array.type, array.element_bytes, begin, array.bytes);
    return begin;
}

void* Block::dynamic_shared_memory(const char* name, const char* type, size_t element_bytes) {
    if (!dynamic_shared_) {
        dynamic_shared_ = take_shared(launch_->shared_bytes, 16);
        if constexpr (CHECKS) checker::add_shared(name, type, element_bytes, dynamic_shared_, launch_->shared_bytes);
    }
    return dynamic_shared_;
}

// ---- a block from beginning to end

void Block::begin_launch(const Launch& launch, void (*call_kernel)(void**)) {
    launch_ = &launch;
    call_kernel_ = call_kernel;
    failed_ = false;
    at_random_ = launch.schedule == Schedule::random;
    if (!arena_) arena_ = std::make_unique<char[]>(ARENA_BYTES);
    const uint3 size = launch.block;
    const int count = static_cast<int>(size.x * size.y * size.z);
    threads_.resize(count);
    for (unsigned thread = 0; thread < threads_.size(); thread++) {
        threads_[thread].index = {thread % size.x, thread / size.x % size.y, thread / size.x / size.y};
    }
    order_.resize(count);
    std::iota(order_.begin(), order_.end(), 0);
    if (launch.schedule == Schedule::descending) std::reverse(order_.begin(), order_.end());
    position.block_size = size;
    position.grid_size = launch.grid;
}

void Block::reset() {
    next_ = finished_ = barrier_sum_ = 0;
    barrier_.clear();
    warm_.clear();
    passed_.clear();
    warps_.resize((threads_.size() + WARP_LANES - 1) / WARP_LANES);
    for (Warp& warp : warps_) {
        warp.arrived = 0;
        warp.live = 0xffffffffu;
    }
    const int rest = threads_.size() % WARP_LANES;
    if (rest) warps_.back().live = (1u << rest) - 1;
    arena_used_ = shared_bytes_ = static_bytes_ = 0;
    dynamic_shared_ = nullptr;
    shared_.clear();
#ifdef __SANITIZE_ADDRESS__
    allocations_.clear();
#endif
    free_fibers_.clear();
    for (auto& fiber : fibers_) free_fibers_.push_back(fiber.get());
    // any seed and block give a state that is not 0
    random_state_ = ((launch_->seed + 1) * 0x9E3779B97F4A7C15u ^ (number_ + 1) * 0xBF58476D1CE4E5B9u) | 1;
    if (at_random_) {
        for (size_t i = order_.size(); i > 1; i--) std::swap(order_[i - 1], order_[random() % i]);
    }
}

void Block::run(uint64_t number) {
    number_ = number;
    reset();
    const uint3 grid = launch_->grid;
    position.block = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                      static_cast<unsigned>(number / grid.x / grid.y)};
    if constexpr (CHECKS) checker::begin_block(number);
    change_to(free_fiber());
    if (!failed_ && finished_ < static_cast<int>(threads_.size())) report(deadlock_text(), false);
}

std::string Block::deadlock_text() const {
    std::string message = block_text(number_) + " waits for ever:";
    const char* comma = "";
    if (!barrier_.empty()) {
        const int thread = barrier_.front();
        message += text(" %u threads at __syncthreads", barrier_.size()) + place_text(threads_[thread].place) +
                   ", the first is " + thread_text(thread);
        comma = ";";
    }
    for (size_t number = 0; number < warps_.size(); number++) {
        const Warp& warp = warps_[number];
        if (!warp.arrived) continue;
        const int lane = __builtin_ctz(warp.arrived), thread = static_cast<int>(number) * WARP_LANES + lane;
        const uint64_t ticket = warp.ticket[lane];
        const uint32_t missing = mask_of(ticket) & warp.live & ~warp.arrived;
        message += text("%s %s waits in %s of mask 0x%x", comma, thread_text(thread).c_str(),
                        name_of(kind_of(ticket)), mask_of(ticket)) + place_text(threads_[thread].place);
        return message + (missing ? text(" for lanes 0x%x", missing) : " for lanes with other masks");
    }
    return message;
}

// ---- the blocks of a launch, over several threads of the operating system

static uint64_t block_count(const Launch& launch) {
    return static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
}

// number of the block to run i-th. at random: i * odd step + seed, modulo a power of two, passes by every number once
class BlockOrder {
public:
    explicit BlockOrder(const Launch& launch) : launch_(launch), count_(block_count(launch)) {
        while (range_ < count_) range_ *= 2;
        step_ = launch.seed * 0x9E3779B97F4A7C15u | 1;
    }
    uint64_t places() const { return launch_.schedule == Schedule::random ? range_ : count_; }
    uint64_t operator[](uint64_t i) const {
        if (launch_.schedule == Schedule::ascending) return i;
        if (launch_.schedule == Schedule::descending) return count_ - 1 - i;
        return (i * step_ + launch_.seed) & (range_ - 1);
    }
    bool holds(uint64_t number) const { return number < count_; }

private:
    const Launch& launch_;
    uint64_t count_, range_ = 1, step_;
};

// workers sleep between launches: a launch is short, and NumPy wants the processor in between
class Workers {
public:
    void run(Launch& launch, void (*call_kernel)(void**)) {
        const uint64_t wanted = std::min<uint64_t>(launch.workers, block_count(launch));
        call_kernel_ = call_kernel;
        next_ = 0;
        start_threads(wanted - 1);
        if (wanted > 1) {
            std::lock_guard<std::mutex> guard(lock_);
            tickets_ = active_ = wanted - 1;
            woken_.notify_all();
        }
        run_blocks(launch, 0);
        std::unique_lock<std::mutex> guard(lock_);
        done_.wait(guard, [this] { return active_ == 0; });
    }

private:
    void start_threads(uint64_t count) {
        blocks_.resize(std::max<size_t>(blocks_.size(), count + 1));
        for (; thread_count_ < count; thread_count_++) {
            std::thread([this, number = thread_count_ + 1] { work(number); }).detach();
        }
    }

    void work(size_t number) {
        for (;;) {
            std::unique_lock<std::mutex> guard(lock_);
            woken_.wait(guard, [this] { return tickets_ > 0; });
            tickets_--;
            guard.unlock();
            run_blocks(*current_launch, number);
            guard.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    void run_blocks(const Launch& launch, size_t worker) {
        const BlockOrder order(launch);
        std::unique_ptr<Block>& block = blocks_[worker];
        if (!block) block = std::make_unique<Block>();
        current_block = block.get();
        block->begin_launch(launch, call_kernel_);
        for (uint64_t i = next_++; i < order.places() && !launch_failed; i = next_++) {
            if (order.holds(order[i])) block->run(order[i]);
        }
    }

    std::vector<std::unique_ptr<Block>> blocks_;
    void (*call_kernel_)(void**) = nullptr;
    std::atomic<uint64_t> next_{0};
    size_t thread_count_ = 0, tickets_ = 0, active_ = 0;
    std::mutex lock_;
    std::condition_variable woken_, done_;
};

// never destroyed: its threads sleep when the process ends. a forked process has lost the threads and gets new ones
static Workers& workers() {
    static Workers* all = nullptr;
    static pid_t owner = 0;
    if (owner != getpid()) {
        all = new Workers;
        owner = getpid();
    }
    return *all;
}

void run(Launch* launch, void (*call_kernel)(void**)) {
    Dl_info library;
    dladdr(reinterpret_cast<void*>(call_kernel), &library);
    module_base = reinterpret_cast<uintptr_t>(library.dli_fbase);
    current_launch = launch;
    launch_failed = false;
    if constexpr (CHECKS) checker::begin_launch(*launch);
    workers().run(*launch, call_kernel);
    current_launch = nullptr;
}

// ---- what kernels call

int syncthreads(bool predicate, int line) {
    return current_block->syncthreads(predicate, line, __builtin_return_address(0));
}

uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int source_lane) {
    return current_block->collective(kind, mask, value, source_lane, __builtin_return_address(0));
}

void* shared_memory(const SharedArray* array) { return current_block->shared_memory(*array); }

void* dynamic_shared_memory(const char* name, const char* type, size_t element_bytes) {
    return current_block->dynamic_shared_memory(name, type, element_bytes);
}

}  // namespace emulator
