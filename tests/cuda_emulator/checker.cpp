// checker.cpp: looks at every load and store of a kernel: bounds, alignment, data races
//
// g++ -fsanitize=thread puts a call in front of each access; these calls end here, no sanitizer's library is there.
// The first error ends the kernel before the access happens.
//
// Two accesses to the same 4 bytes, one of them a plain store, must be ordered: by a barrier of the block, by a
// __syncwarp of which both threads are a part, or by being of one thread. A shuffle orders nothing. Of each 4 bytes the
// shadow memory knows the last plain store, and the loads and atomics since; so an error shows under every schedule.
#include <cstdio>
#include <cstdlib>
#include <link.h>

#include <algorithm>
#include <unordered_map>

#include "scheduler.h"

namespace emulator {

uint3 thread_index() { return position.thread; }
uint3 block_index() { return position.block; }
uint3 block_size() { return position.block_size; }
uint3 grid_size() { return position.grid_size; }
int lane() { return position.thread_number % WARP_LANES; }

namespace checker {

enum class Access { load, store, atomic };

// ---- what a kernel may touch

struct Region {
    const char* name;
    const char* type;  // of an element
    size_t element_bytes;
    uintptr_t begin, end;
    bool shared;

    bool holds(uintptr_t address, size_t bytes) const { return address >= begin && address + bytes <= end; }
    uintptr_t distance(uintptr_t address) const {
        return address < begin ? begin - address : address >= end ? address - end : 0;
    }
    long element(uintptr_t address) const {  // rounded down, also in front of the array
        const long bytes = static_cast<long>(address - begin), size = static_cast<long>(element_bytes);
        return bytes >= 0 ? bytes / size : -((-bytes + size - 1) / size);
    }
    size_t elements() const { return (end - begin) / element_bytes; }

    std::string element_text(uintptr_t address) const {
        constexpr size_t LARGEST_VECTOR = 16;  // beyond, it is a struct
        const std::string what = text("%s %ld of %s", type, element(address), name);
        return element_bytes <= LARGEST_VECTOR ? what : what + text(", byte %zu", (address - begin) % element_bytes);
    }
};

static std::vector<Region> regions;  // the launch's arrays, then the block's shared memory
static size_t global_regions, last_found;
static uintptr_t module_end;  // constants and variables of the kernel's file lie between module_base and here

static const Region* find_region(uintptr_t address, size_t bytes) {
    if (last_found < regions.size() && regions[last_found].holds(address, bytes)) return &regions[last_found];
    for (last_found = 0; last_found < regions.size(); last_found++) {
        if (regions[last_found].holds(address, bytes)) return &regions[last_found];
    }
    return nullptr;
}

static bool in_module(uintptr_t address) { return address >= module_base && address < module_end; }

static const char* verb(Access access) {
    return access == Access::load ? "reads" : access == Access::store ? "writes" : "adds to or exchanges";
}

static std::string this_thread() { return current_block->thread_text(position.thread_number); }

[[noreturn]] static void fail_out_of_bounds(uintptr_t address, size_t bytes, Access access, const void* place) {
    const std::string who = "out of bounds: " + this_thread() + " " + verb(access);
    const auto nearest = std::min_element(regions.begin(), regions.end(), [=](const Region& a, const Region& b) {
        return a.distance(address) < b.distance(address);
    });
    constexpr uintptr_t NEAR = 1 << 30;  // further away it is not an index gone astray
    if (nearest == regions.end() || nearest->distance(address) > NEAR) {
        current_block->fail(who + text(" %zu bytes at 0x%lx, far from all arrays", bytes, address) + place_text(place));
    }
    // an access that begins inside and ends outside: name the first element outside
    const uintptr_t outside = address < nearest->begin ? address : std::max(address, nearest->end);
    current_block->fail(who + " " + nearest->element_text(outside) + text(", which has %zu", nearest->elements()) +
                        place_text(place));
}

[[noreturn]] static void fail_misaligned(uintptr_t address, size_t bytes, const char* access, const void* place) {
    std::string what = text("misaligned: %s %s %zu bytes at an address that is no multiple of it",
                            this_thread().c_str(), access, bytes);
    if (const Region* region = find_region(address, 1)) {
        what += ", " + region->element_text(address);
        if (region->shared) what += text(", which needs __align__(%zu)", bytes);
    }
    current_block->fail(what + place_text(place));
}

// ---- order of accesses

// time of a warp passes at each barrier and each __syncwarp
struct WarpTime {
    uint32_t now = 0;
    uint32_t barrier = 0;                        // when the last barrier was
    uint32_t known[WARP_LANES][WARP_LANES] = {};  // [a][b]: what b did before this time comes before what a does now
};

static std::vector<WarpTime> warp_times;
static uint32_t run, first_run, next_launch = 1;  // numbers a launch's blocks; 0 is no block

// those who accessed 4 bytes: one thread, or several of one kind between which there need not be an order
struct Accesses {
    uint32_t run;     // block of the last access
    uint32_t time;    // of its warp, then
    uint32_t lanes;   // of its warp
    uint32_t place;   // in the library
    uint16_t warp;
    bool other_blocks, other_warps;  // also other blocks; also other warps since the last barrier
};

struct Cell {
    Accesses stores, loads, atomics;
};

static int last_lane(const Accesses& accesses) { return WARP_LANES - 1 - __builtin_clz(accesses.lanes); }

static bool is_empty(const Accesses& past, bool shared) {
    return shared ? past.run != run : past.run < first_run;
}

// null when all of `past` come before what the running thread does now, else a lane that does not (or -1: the block)
static bool comes_before(const Accesses& past, bool shared, int& culprit) {
    if (is_empty(past, shared)) return true;
    culprit = -1;
    if (past.run != run || past.other_blocks) return false;
    const WarpTime& times = warp_times[past.warp];
    if (past.time < times.barrier) return true;
    culprit = past.warp * WARP_LANES + last_lane(past);
    const int me = position.thread_number;
    if (past.other_warps || past.warp != me / WARP_LANES) return false;
    const uint32_t* known = times.known[me % WARP_LANES];
    for (uint32_t rest = past.lanes & ~(1u << me % WARP_LANES); rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        culprit = past.warp * WARP_LANES + lane;
        if (known[lane] <= past.time) return false;
    }
    return true;
}

static Accesses access_now(const void* place) {
    const int thread = position.thread_number, warp = thread / WARP_LANES;
    return {run, warp_times[warp].now, 1u << thread % WARP_LANES,
            static_cast<uint32_t>(reinterpret_cast<uintptr_t>(place) - module_base), static_cast<uint16_t>(warp),
            false, false};
}

// adds the running thread's access; those before it are forgotten, since they come before all that it comes before
static void add_access(Accesses& past, bool shared, const void* place) {
    Accesses now = access_now(place);
    if (!is_empty(past, shared)) {
        now.other_blocks = past.other_blocks || past.run != run;
        if (past.run == run && past.time >= warp_times[past.warp].barrier) {
            now.other_warps = past.other_warps || past.warp != now.warp;
            if (past.warp == now.warp) {
                const uint32_t* known = warp_times[now.warp].known[position.thread_number % WARP_LANES];
                for (uint32_t rest = past.lanes; rest; rest &= rest - 1) {
                    const int lane = __builtin_ctz(rest);
                    if (known[lane] <= past.time) now.lanes |= 1u << lane;
                }
            }
        }
    }
    past = now;
}

[[noreturn]] static void fail_race(const Region* region, uintptr_t address, Access access, const void* place,
                                   const Accesses& past, Access past_access, int culprit) {
    const char* const done = past_access == Access::load ? "read" : past_access == Access::store ? "wrote" : "updated";
    const bool other_block = past.run != run;
    const int thread = other_block ? past.warp * WARP_LANES + last_lane(past) : culprit;
    std::string other = "another block";
    if (thread >= 0) {
        other = current_block->thread_text(thread);
        if (other_block) {
            other = other.substr(0, other.find(" of ")) + " of " + current_block->block_text(past.run - first_run);
        }
    }
    const bool same_warp = !other_block && thread >= 0 && thread / WARP_LANES == position.thread_number / WARP_LANES;
    const char* const missing = other_block || thread < 0 ? "blocks of a launch have no order; atomics on both sides do"
                                : same_warp               ? "a __syncwarp or __syncthreads in between is missing"
                                                          : "a __syncthreads in between is missing";
    std::string what = "a variable of the file";
    if (region) what = region->element_text(address);
    const void* past_place = reinterpret_cast<const void*>(module_base + past.place);
    current_block->fail("data race: " + this_thread() + " " + verb(access) + " " + what + place_text(place) +
                        ", which " + other + " " + done + place_text(past_place) + ": " + missing);
}

// ---- shadow memory

constexpr uintptr_t PAGE = 4096, CELL_BYTES = 4;
constexpr size_t CELLS = PAGE / CELL_BYTES;
constexpr size_t MOST_PAGES = 16384;  // 1 GB
constexpr size_t RECENT_PAGES = 256;

struct FreeCells {
    void operator()(Cell* cells) const { std::free(cells); }
};
static std::unordered_map<uintptr_t, std::unique_ptr<Cell, FreeCells>> pages;
static struct { uintptr_t number; Cell* cells; } recent[RECENT_PAGES];

static Cell& cell_of(uintptr_t address) {
    const uintptr_t number = address / PAGE;
    auto& hint = recent[number % RECENT_PAGES];
    if (hint.number != number) {
        auto& page = pages[number];
        if (!page) page.reset(static_cast<Cell*>(std::calloc(CELLS, sizeof(Cell))));
        hint = {number, page.get()};
    }
    return hint.cells[address % PAGE / CELL_BYTES];
}

static void forget_everything() {
    pages.clear();
    for (auto& hint : recent) hint = {};
    next_launch = 1;
}

static void check_order(const Region* region, uintptr_t address, Access access, const void* place) {
    const bool shared = region && region->shared;
    Cell& cell = cell_of(address);
    int culprit = -1;
    if (!comes_before(cell.stores, shared, culprit)) {
        fail_race(region, address, access, place, cell.stores, Access::store, culprit);
    }
    if (access != Access::atomic && !comes_before(cell.atomics, shared, culprit)) {
        fail_race(region, address, access, place, cell.atomics, Access::atomic, culprit);
    }
    if (access != Access::load && !comes_before(cell.loads, shared, culprit)) {
        fail_race(region, address, access, place, cell.loads, Access::load, culprit);
    }
    switch (access) {
        case Access::load: add_access(cell.loads, shared, place); break;
        case Access::atomic: add_access(cell.atomics, shared, place); break;
        case Access::store: cell = {access_now(place), {}, {}}; break;
    }
}

// ---- an access

static void look_at(const void* pointer, size_t bytes, Access access, const void* place) {
    if (current_block->running().has(pointer)) return;  // a local variable
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const Region* region = find_region(address, bytes);
    if (!region && !in_module(address)) fail_out_of_bounds(address, bytes, access, place);
    const bool power_of_two = (bytes & (bytes - 1)) == 0;
    if (power_of_two && address % bytes) fail_misaligned(address, bytes, verb(access), place);
    // smaller ones share 4 bytes without harm
    for (uintptr_t cell = address; cell + CELL_BYTES <= address + bytes; cell += CELL_BYTES) {
        check_order(region, cell, access, place);
    }
}

// ---- what the scheduler tells

static int find_module_end(dl_phdr_info* library, size_t, void*) {
    if (library->dlpi_addr != module_base) return 0;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        const auto& segment = library->dlpi_phdr[i];
        if (segment.p_type == PT_LOAD) module_end = module_base + segment.p_vaddr + segment.p_memsz;
    }
    return 1;
}

void begin_launch(const Launch& launch) {
    const uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (pages.size() > MOST_PAGES || next_launch + blocks > UINT32_MAX) forget_everything();
    first_run = next_launch;
    next_launch += static_cast<uint32_t>(blocks);
    regions.clear();
    for (int i = 0; i < launch.argument_count; i++) {
        const Argument& array = launch.arguments[i];
        const uintptr_t begin = reinterpret_cast<uintptr_t>(array.begin);
        regions.push_back({array.name, array.type, array.element_bytes, begin, begin + array.bytes, false});
    }
    global_regions = regions.size();
    const uint64_t threads = static_cast<uint64_t>(launch.block.x) * launch.block.y * launch.block.z;
    warp_times.assign((threads + WARP_LANES - 1) / WARP_LANES, {});
    dl_iterate_phdr(find_module_end, nullptr);
}

void begin_block(uint64_t number) {
    run = first_run + static_cast<uint32_t>(number);
    regions.resize(global_regions);
    for (WarpTime& times : warp_times) times = {};
}

void add_shared(const char* name, const char* type, size_t element_bytes, const void* begin, size_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
    regions.push_back({name, type, element_bytes, address, address + bytes, true});
}

void barrier() {
    for (WarpTime& times : warp_times) times.barrier = ++times.now;
}

// each lane now comes after all that any of the lanes came after
void warp_sync(int warp, uint32_t lanes) {
    WarpTime& times = warp_times[warp];
    times.now++;
    uint32_t joined[WARP_LANES] = {};
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        const uint32_t* known = times.known[__builtin_ctz(rest)];
        for (int lane = 0; lane < WARP_LANES; lane++) joined[lane] = std::max(joined[lane], known[lane]);
    }
    for (uint32_t rest = lanes; rest; rest &= rest - 1) joined[__builtin_ctz(rest)] = times.now;
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        memcpy(times.known[__builtin_ctz(rest)], joined, sizeof joined);
    }
}

}  // namespace checker

void note_atomic(const void* address, size_t bytes, const void* place) {
    checker::look_at(address, bytes, checker::Access::atomic, place);
}

}  // namespace emulator

// ---- the calls that g++ puts into the kernel's file

using emulator::checker::Access;
using emulator::checker::look_at;

#define CALLBACKS(bytes)                                                                                           \
    void __tsan_read##bytes(void* address) { look_at(address, bytes, Access::load, __builtin_return_address(0)); } \
    void __tsan_write##bytes(void* address) {                                                                      \
        look_at(address, bytes, Access::store, __builtin_return_address(0));                                       \
    }                                                                                                              \
    void __tsan_unaligned_read##bytes(void* address) {                                                             \
        look_at(address, bytes, Access::load, __builtin_return_address(0));                                        \
    }                                                                                                              \
    void __tsan_unaligned_write##bytes(void* address) {                                                            \
        look_at(address, bytes, Access::store, __builtin_return_address(0));                                       \
    }

// what g++ -fsanitize=alignment,bounds knows of an expression
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};
struct TypeDescriptor {
    uint16_t kind, info;
    char name[1];
};
struct TypeMismatch {
    SourceLocation location;
    const TypeDescriptor* type;
    uint8_t log_alignment, kind;
};
struct IndexOutOfBounds {
    SourceLocation location;
    const TypeDescriptor *array, *index;
};

extern "C" {

CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)

void __tsan_read_range(void* address, size_t bytes) {
    look_at(address, bytes, Access::load, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
    look_at(address, bytes, Access::store, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// a pointer about to be used as one to a type; this sees a float4 also where g++ then loads four floats
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* expression, uintptr_t address) {
    constexpr uint8_t STORE = 1;
    const size_t alignment = size_t{1} << expression->log_alignment;
    const char* const access = expression->kind == STORE ? "writes" : "reads";
    emulator::checker::fail_misaligned(address, alignment, access, __builtin_return_address(0));
}

void __ubsan_handle_out_of_bounds(const IndexOutOfBounds* expression, uintptr_t index) {
    emulator::current_block->fail(emulator::text("out of bounds: %s uses index %ld of a %s",
                                                 emulator::checker::this_thread().c_str(), static_cast<long>(index),
                                                 expression->array->name) +
                                  emulator::place_text(__builtin_return_address(0)));
}

}
