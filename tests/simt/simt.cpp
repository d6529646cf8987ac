// The scheduler and the checks behind simt.h. Never compiled with a sanitizer itself: it tells the
// sanitizers (SIMT_ADDRESS, SIMT_THREAD) what orders the threads, and nothing else orders them.
#include "simt.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <memory>
#include <string>
#include <vector>
#ifdef SIMT_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_THREAD
#include <sanitizer/tsan_interface.h>
#endif

#include "fibers.h"
#include "halves.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStaticShared = 16 << 10;  // room for the static objects of a block
constexpr size_t kGap = 128;                // unused, between the shared memories of two blocks
constexpr size_t kMaxFibers = 8000;         // that the thread sanitizer can tell apart
constexpr cudaError_t kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidCluster = 912;
constexpr cudaError_t kFound = 1000;

// ---- What runs ----

struct Barrier {
  unsigned need = 0, arrived = 0, generation = 0;
  const char* what = "";
  char clocks[2] = {};  // of the thread sanitizer: one may arrive again before all have left
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32] = {};
};

struct Block {
  unsigned index = 0, rank = 0, left = 0;  // left: threads that have not ended
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;  // the dynamic part, then kStaticShared
  char clock = 0;
};

struct Cluster;

struct Fiber {
  Cluster* cluster = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned thread = 0;
  bool done = false;
  const char* where = "";      // it waits, for
  Barrier* barrier = nullptr;  // this one's
  unsigned generation = 0;     // to be over
  unsigned shuffles = 0;
  bool arrived = false;  // at the barrier of the cluster, in
  unsigned arrival = 0;  // this generation
  std::vector<Copy> copies;
  char* stack = nullptr;
  Context context;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  bool fenced = false;           // and what came before is in
  char fence_clock = 0;          // this one
  char* atomic_clock = nullptr;  // of the atomic that it used last

  bool can_run() const { return !done && (!barrier || barrier->generation != generation); }
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::unique_ptr<unsigned char[]> memory;
  size_t step = 0;  // from the shared memory of a block to the next one's
  unsigned left = 0;
  Barrier barrier;
};

struct Grid {
  Launch size;
  const std::function<void()>& thread;
  std::map<const void*, size_t> statics;  // key of a static shared object -> its place
  size_t static_bytes = 0;
  bool given_up = false;
};

// ---- State: of the host, and of the launch in progress ----

struct Device {
  int capability = 90, max_cluster = 16, multiprocessors = 132;
  size_t shared_bytes() const {
    if (capability == 80) return 163 << 10;
    return (capability == 90 || capability / 10 == 10 ? 227 : 99) << 10;
  }
};

// A matrix in global memory. Bytes between two rows are out of bounds.
struct Span {
  std::string name;
  uintptr_t start;
  size_t row_bytes, row_step, rows;
  bool shared;  // blocks may write what others read or write
  uint64_t loads = 0, stores = 0;
  std::vector<uint32_t> writers;  // of each byte: first_stamp + block

  // The place of an access among the bytes of the rows, -1 if it is not inside of one.
  int64_t place(uintptr_t at, size_t size) const {
    if (at < start) return -1;
    const size_t row = (at - start) / row_step, column = (at - start) % row_step;
    return row < rows && column + size <= row_bytes ? int64_t(row * row_bytes + column) : -1;
  }
};

Device device;
unsigned seed;  // 0: in order
std::vector<Span> spans;
std::vector<Launch> launches;
struct Prepared {
  uint32_t shared_bytes = 48 << 10, cluster = 8;
};
std::map<const void*, Prepared> prepared;
uint64_t exp2_calls;
uint32_t first_stamp = 1;
std::string found;  // the first error

Grid* grid;
Fiber* current;
Context host;
uint64_t random_state;

uint64_t random_below(uint64_t bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % bound;
}

template <class T>
void shuffle(std::vector<T>& values) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random_below(i)]);
}

[[noreturn]] void give_up(const std::string& what);

// ---- Sanitizers ----

#ifdef SIMT_THREAD
void* host_tsan;
void acquire(char& clock) { __tsan_acquire(&clock); }
void release(char& clock) { __tsan_release(&clock); }

// Each carries one clock to another, without those of the thread that asks for it. They begin
// before the launch: afterwards, whoever made them would have given them a clock.
std::vector<void*> carriers;

void begin_carriers(size_t count) {
  for (size_t i = 0; i < count; ++i) carriers.push_back(__tsan_create_fiber(0));
}

void carry(char& from, char& to) {
  if (carriers.empty()) give_up("too many atomics for the thread sanitizer");
  __tsan_switch_to_fiber(carriers.back(), __tsan_switch_to_fiber_no_sync);
  acquire(from);
  release(to);
  __tsan_switch_to_fiber(current->tsan, __tsan_switch_to_fiber_no_sync);
  __tsan_destroy_fiber(carriers.back());
  carriers.pop_back();
}

void end_carriers() {
  for (void* fiber : carriers) __tsan_destroy_fiber(fiber);
  carriers.clear();
}
#else
void acquire(char&) {}
void release(char&) {}
void begin_carriers(size_t) {}
void carry(char&, char&) {}
void end_carriers() {}
#endif

#ifdef SIMT_ADDRESS
void* host_fake_stack;
const void* host_stack;
size_t host_stack_size;
void poison(const void* at, size_t size) { __asan_poison_memory_region(at, size); }
void unpoison(const void* at, size_t size) { __asan_unpoison_memory_region(at, size); }
#else
void poison(const void*, size_t) {}
void unpoison(const void*, size_t) {}
#endif

void to_scheduler() {
  Fiber& self = *current;
#ifdef SIMT_THREAD
  __tsan_switch_to_fiber(host_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_ADDRESS
  __sanitizer_start_switch_fiber(self.done ? nullptr : &self.fake_stack, host_stack,
                                 host_stack_size);
#endif
  self.context.go_to(host);
#ifdef SIMT_ADDRESS
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = {fiber.block->index, 0, 0};
#ifdef SIMT_THREAD
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_ADDRESS
  __sanitizer_start_switch_fiber(&host_fake_stack, fiber.stack, kStack);
#endif
  host.go_to(fiber.context);
#ifdef SIMT_ADDRESS
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

// ---- Errors ----

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  char buffer[400];
  va_list list;
  va_start(list, format);
  vsnprintf(buffer, sizeof(buffer), format, list);
  va_end(list);
  return buffer;
}

void report(const std::string& what) {
  if (!found.empty()) return;
  found = "simt: " + what;
  if (current) found += text(" (block %u, thread %u)", current->block->index, current->thread);
}

// The launch cannot go on.
[[noreturn]] void give_up(const std::string& what) {
  report(what);
  grid->given_up = true;
  to_scheduler();
  abort();  // never resumed
}

// Where each unfinished thread of the first cluster waits.
void report_deadlock(const Cluster& cluster) {
  struct Group {
    unsigned threads = 0;
    const Fiber* first = nullptr;
  };
  std::map<std::string, Group> groups;
  for (const Fiber& fiber : cluster.fibers) {
    Group& group = groups[fiber.done ? "have ended" : text("wait at %s", fiber.where)];
    if (group.threads++ == 0) group.first = &fiber;
  }
  std::string all = "deadlock:";
  for (const auto& [state, group] : groups) {
    all += text("%s %u threads %s (the first: block %u, thread %u)", all.back() == ':' ? "" : ",",
                group.threads, state.c_str(), group.first->block->index, group.first->thread);
  }
  report(all);
}

// ---- Barriers ----

unsigned arrive(Barrier& barrier, const char* what, bool orders = true) {
  if (barrier.arrived == 0) barrier.what = what;
  if (strcmp(barrier.what, what) != 0) {
    give_up(text("a thread comes to %s where another waits at %s", what, barrier.what));
  }
  const unsigned generation = barrier.generation;
  if (orders) release(barrier.clocks[generation % 2]);
  if (++barrier.arrived == barrier.need) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return generation;
}

void wait(Barrier& barrier, unsigned generation, const char* what, bool orders = true) {
  if (barrier.generation == generation) {
    current->where = what;
    current->barrier = &barrier;
    current->generation = generation;
    to_scheduler();
  }
  if (orders) acquire(barrier.clocks[generation % 2]);
}

void meet(Barrier& barrier, const char* what) { wait(barrier, arrive(barrier, what), what); }

void need_full_mask(const char* what, unsigned mask) {
  if (mask != ~0u) give_up(text("%s with the mask %#x; only ~0u is simulated", what, mask));
}

// ---- Clusters of blocks, from start to end ----

void fiber_main() {
#ifdef SIMT_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
#endif
  grid->thread();
  release(current->block->clock);
  current->done = true;
  to_scheduler();
}

void clear_shared(Block& block) {
  memset(block.shared, 0xff, grid->size.shared_bytes + kStaticShared);
}

std::unique_ptr<Cluster> start_cluster(unsigned index) {
  const auto [_, threads, shared_bytes, size] = grid->size;
  auto cluster = std::make_unique<Cluster>();
  cluster->step = (shared_bytes + kStaticShared + kGap + 127) / 128 * 128;
  cluster->memory.reset(new unsigned char[cluster->step * size + 128]);
  cluster->blocks.resize(size);
  cluster->fibers.resize(size_t(size) * threads);
  cluster->barrier.need = cluster->left = size * threads;
  unsigned char* memory = cluster->memory.get();
  memory += -reinterpret_cast<uintptr_t>(memory) & 127;
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = cluster->blocks[rank];
    block.index = index * size + rank;
    block.rank = rank;
    block.barrier.need = block.left = threads;
    block.shared = memory + rank * cluster->step;
    clear_shared(block);
    poison(block.shared + shared_bytes, cluster->step - shared_bytes);
    block.warps.resize((threads + 31) / 32);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = cluster->fibers[size_t(rank) * threads + t];
      fiber.cluster = cluster.get();
      fiber.block = &block;
      fiber.warp = &block.warps[t / 32];
      fiber.warp->barrier.need++;
      fiber.thread = t;
      fiber.stack = take_stack();
      fiber.context.begin(fiber.stack, fiber_main);
#ifdef SIMT_THREAD
      fiber.tsan = __tsan_create_fiber(0);
#endif
    }
  }
  return cluster;
}

// Whoever reads the shared memory of a block that has ended, reads NaN.
void end_block(Block& block) {
  acquire(block.clock);
  unpoison(block.shared, grid->size.shared_bytes + kStaticShared);
  clear_shared(block);
  poison(block.shared, grid->size.shared_bytes + kStaticShared);
}

void end_cluster(Cluster& cluster) {
  unpoison(cluster.memory.get(), cluster.step * cluster.blocks.size() + 128);
  for (Fiber& fiber : cluster.fibers) {
    give_stack(fiber.stack);
#ifdef SIMT_THREAD
    __tsan_destroy_fiber(fiber.tsan);
#endif
  }
}

// ---- Schedules ----

struct Unit {  // of the schedule: the threads of a warp
  Fiber* first;
  unsigned lanes;
};

// Every lane that can run, runs to where it must wait. True if there was one.
bool step(const Unit& warp) {
  const unsigned turn = seed ? unsigned(random_below(warp.lanes)) : 0;
  bool moved = false;
  for (unsigned i = 0; i < warp.lanes && !grid->given_up; ++i) {
    Fiber& fiber = warp.first[(i + turn) % warp.lanes];
    if (!fiber.can_run()) continue;
    moved = true;
    fiber.barrier = nullptr;
    resume(fiber);
    if (!fiber.done) continue;
    --fiber.cluster->left;
    if (--fiber.block->left == 0) end_block(*fiber.block);
  }
  return moved;
}

std::vector<Unit> warps_of(const std::vector<std::unique_ptr<Cluster>>& clusters) {
  std::vector<Unit> warps;
  const unsigned threads = grid->size.threads;
  for (const auto& cluster : clusters) {
    for (size_t i = 0; i < cluster->fibers.size(); i += threads) {
      for (unsigned t = 0; t < threads; t += 32) {
        warps.push_back({&cluster->fibers[i + t], min(32u, threads - t)});
      }
    }
  }
  return warps;
}

// In order, each warp runs as far as it can, and one cluster ends before the next begins. Shuffled,
// some clusters are live at once, and each warp in turn runs some steps or as far as it can.
void run_grid() {
  std::vector<unsigned> order(grid->size.grid / grid->size.cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (seed) shuffle(order);
#ifdef SIMT_THREAD
  const size_t resident = order.size();  // or the start of one would be ordered after another
#else
  const size_t resident = seed ? 4 : 1;
#endif
  std::vector<std::unique_ptr<Cluster>> live;
  for (size_t next = 0; next < order.size() || !live.empty();) {
    while (next < order.size() && live.size() < resident) {
      live.push_back(start_cluster(order[next++]));
    }
    std::vector<Unit> warps = warps_of(live);
    if (seed) shuffle(warps);
    bool moved = false;
    for (const Unit& warp : warps) {
      const uint64_t stop = seed ? random_below(4) : 0;  // 0: as far as it can
      for (uint64_t i = 1; step(warp); ++i) {
        moved = true;
        if (i == stop) break;
      }
    }
    if (!moved && !grid->given_up) {
      report_deadlock(*live.front());
      grid->given_up = true;
    }
    for (size_t i = live.size(); i-- > 0;) {
      if (live[i]->left && !grid->given_up) continue;
      end_cluster(*live[i]);
      live.erase(live.begin() + i);
    }
    if (grid->given_up) break;
  }
}

cudaError_t refusal(const void* kernel, const Launch& launch) {
  const Prepared& has = prepared[kernel];
  if (launch.grid == 0 || launch.grid > 0x7fffffff) return kInvalidConfiguration;
  if (launch.threads == 0 || launch.threads > 1024) return kInvalidConfiguration;
  if (launch.shared_bytes > has.shared_bytes) return kInvalidValue;
  if (launch.cluster == 0 || launch.grid % launch.cluster) return kInvalidCluster;
  const unsigned largest = min(has.cluster, unsigned(max(1, device.max_cluster)));
  return launch.cluster > largest ? kInvalidCluster : cudaSuccess;
}

}  // namespace

// ---- The functions of simt.h ----

int prepare(const void* kernel, int shared_bytes, bool large_clusters) {
  if (shared_bytes < 0 || size_t(shared_bytes) > device.shared_bytes()) return kInvalidValue;
  prepared[kernel] = {max(48u << 10, unsigned(shared_bytes)), large_clusters ? 16u : 8u};
  return cudaSuccess;
}

int max_clusters(const void* kernel, const Launch& launch, int& count) {
  count = refusal(kernel, launch) ? 0 : device.multiprocessors / int(launch.cluster);
  return cudaSuccess;
}

int run(const void* kernel, const Launch& launch, const std::function<void()>& thread) {
  if (const cudaError_t error = refusal(kernel, launch)) return error;
  found.clear();
#ifdef SIMT_THREAD
  host_tsan = __tsan_get_current_fiber();
  if (size_t(launch.grid) * launch.threads > kMaxFibers) {
    report(text("more than %zu threads under the thread sanitizer", kMaxFibers));
    return kFound;
  }
#else
  (void)kMaxFibers;
#endif
  launches.push_back(launch);
  gridDim = dim3(launch.grid);
  blockDim = dim3(launch.threads);
  random_state = seed * 0x9e3779b97f4a7c15u | 1;
  Grid now{launch, thread, {}, 0, false};
  grid = &now;
  begin_carriers(2 * launch.grid);
  run_grid();
  end_carriers();
  grid = nullptr;
  first_stamp += launch.grid;
  return found.empty() ? cudaSuccess : kFound;
}

bool allowed(Access access, const void* pointer, size_t size, size_t alignment) {
  static const char* const kNames[] = {"load", "store", "atomic"};
  const char* name = kNames[int(access)];
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  if (at % alignment || at < 4096) {
    report(text("%s of %zu bytes at the address %#zx, which is %s", name, size, size_t(at),
                at < 4096 ? "null" : "not aligned"));
    return false;
  }
  const Span* before = nullptr;
  for (Span& span : spans) {
    const int64_t place = span.place(at, size);
    if (place < 0) {
      if (span.start <= at && (!before || span.start > before->start)) before = &span;
      continue;
    }
    if (access == Access::kUpdate) return true;
    const bool stores = access == Access::kStore;
    (stores ? span.stores : span.loads) += size;
    if (span.shared || (!stores && span.writers.empty())) return true;
    if (span.writers.empty()) span.writers.resize(span.rows * span.row_bytes);
    const uint32_t stamp = first_stamp + blockIdx.x;
    for (size_t i = place; i < place + size; ++i) {
      uint32_t& writer = span.writers[i];
      if (writer >= first_stamp && writer != stamp) {
        report(text("blocks %u and %u both %s byte %zu of '%s'", writer - first_stamp, blockIdx.x,
                    stores ? "write" : "access", i, span.name.c_str()));
      }
      if (stores) writer = stamp;
    }
    return true;
  }
  if (spans.empty()) return true;
  const std::string of =
      before ? text(", byte %zu from the start of '%s'", at - before->start, before->name.c_str())
             : "";
  report(text("%s of %zu bytes out of bounds%s", name, size, of.c_str()));
  return false;
}

void begin_copy(const Copy& copy) {
  static const uint4 kNothing = {~0u, ~0u, ~0u, ~0u};
  const auto* to = reinterpret_cast<unsigned char*>(copy.shared);
  const Block& block = *current->block;
  if (to < block.shared || to + 16 > block.shared + grid->size.shared_bytes + kStaticShared ||
      reinterpret_cast<uintptr_t>(to) % 16) {
    give_up("copy_async16 to what is not 16 aligned bytes of the block's shared memory");
  }
  const bool may = allowed(Access::kLoad, copy.global, 16, 16);
  current->copies.push_back({copy.shared, may ? copy.global : &kNothing});
}

bool end_copy(Copy& copy) {
  if (current->copies.empty()) return false;
  copy = current->copies.back();
  current->copies.pop_back();
  return true;
}

void* shared_object(const void* key, size_t size) {
  const auto [at, is_new] = grid->statics.try_emplace(key, grid->static_bytes);
  if (is_new) {
    grid->static_bytes += (size + 15) / 16 * 16 + 16;  // 16 bytes that belong to none
    if (grid->static_bytes + 16 > kStaticShared ||
        grid->static_bytes + grid->size.shared_bytes > device.shared_bytes() + 1024) {
      give_up("too much static shared memory");
    }
  }
  unsigned char* object = dynamic_shared() + grid->size.shared_bytes;
  object += (-reinterpret_cast<uintptr_t>(object) & 15) + at->second;
  unpoison(object, size);
  return object;
}

unsigned char* dynamic_shared() { return current->block->shared; }

void* peer(void* shared, unsigned rank) {
  auto* at = static_cast<unsigned char*>(shared);
  const size_t place = at - current->block->shared;
  if (at < current->block->shared || place >= grid->size.shared_bytes + kStaticShared) {
    give_up("cluster_peer of what is not in the block's shared memory");
  }
  if (rank >= grid->size.cluster) {
    give_up(text("cluster_peer of block %u in a cluster of %u", rank, grid->size.cluster));
  }
  return current->cluster->blocks[rank].shared + place;
}

unsigned lane() { return current->thread % 32; }

// On a GPU the exchange orders nothing else, so it does not here.
uint64_t exchange(const char* what, unsigned mask, uint64_t value, unsigned from) {
  need_full_mask(what, mask);
  Warp& warp = *current->warp;
  uint64_t (&slots)[32] = warp.slots[current->shuffles++ % 2];
  slots[lane()] = value;
  wait(warp.barrier, arrive(warp.barrier, what, false), what, false);
  if (from >= warp.barrier.need) give_up(text("%s from lane %u, which is not there", what, from));
  return slots[from];
}

// What came before a thread's last fence is published; what it finds published it may read after
// its next fence.
void before_atomic(void* counter) {
  to_scheduler();  // others may come first
  char& clock = *static_cast<char*>(counter);
  if (current->fenced) carry(current->fence_clock, clock);
  current->atomic_clock = &clock;
}

}  // namespace simt

using namespace simt;

void __syncthreads() { meet(current->block->barrier, "__syncthreads"); }

void __syncwarp(unsigned mask) {
  need_full_mask("__syncwarp", mask);
  meet(current->warp->barrier, "__syncwarp");
}

void __threadfence() {
  if (current->atomic_clock) acquire(*current->atomic_clock);
  release(current->fence_clock);
  current->fenced = true;
}

unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return grid->size.cluster; }

void cluster_arrive() {
  if (current->arrived) give_up("cluster_arrive twice without cluster_wait");
  current->arrived = true;
  current->arrival = arrive(current->cluster->barrier, "cluster_arrive");
}

void cluster_wait() {
  if (!current->arrived) give_up("cluster_wait without cluster_arrive");
  current->arrived = false;
  wait(current->cluster->barrier, current->arrival, "cluster_wait");
}

// ---- Numbers ----

// As the GPU's instruction, but for its rounding: denormals are zeros.
float exp2_of(float x) {
  ++exp2_calls;
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}
double exp2_of(double x) {
  ++exp2_calls;
  return exp2(x);
}

float2 half2_floats(uint32_t word) { return {from_half(word & 0xffff), from_half(word >> 16)}; }
uint32_t floats_half2(float low, float high) { return to_half(low) | to_half(high) << 16; }
uint32_t floats_bfloat2(float low, float high) { return to_bfloat(low) | to_bfloat(high) << 16; }

// ---- The simulated device ----

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case kInvalidValue:
      return "invalid argument";
    case kInvalidConfiguration:
      return "invalid configuration argument";
    case kInvalidCluster:
      return "cluster misconfiguration";
    case kFound:
      return found.c_str();
    default:
      return "unknown error";
  }
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : kInvalidValue; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return kInvalidValue;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(device.shared_bytes());
      return cudaSuccess;
  }
  return kInvalidValue;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

// ---- For the harness: tests/simt/__init__.py and replay.cpp ----

extern "C" {
#pragma GCC visibility push(default)

void simt_seed(unsigned value) { seed = value; }

void simt_device(int capability, int max_cluster) {
  device.capability = capability;
  device.max_cluster = max_cluster;
}

void simt_watch(const char* name, uintptr_t start, size_t row_bytes, size_t row_step, size_t rows,
                int shared) {
  spans.push_back({name, start, row_bytes, row_step, rows, shared != 0, 0, 0, {}});
}

void simt_unwatch() {
  spans.clear();
  launches.clear();
  exp2_calls = 0;
}

void simt_counts(size_t span, uint64_t* loads, uint64_t* stores) {
  *loads = spans[span].loads;
  *stores = spans[span].stores;
}

uint64_t simt_exp2_calls() { return exp2_calls; }

const char* simt_error() { return found.c_str(); }

// Of arrays: for a test of the conversions.
void simt_to_half(const float* from, uint16_t* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = uint16_t(floats_half2(from[i], 0));
}
void simt_to_bfloat(const float* from, uint16_t* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = uint16_t(floats_bfloat2(from[i], 0));
}
void simt_from_half(const uint16_t* from, float* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = half2_floats(from[i]).x;
}

size_t simt_launches(uint32_t (*out)[4], size_t room) {
  for (size_t i = 0; i < min(room, launches.size()); ++i) memcpy(out[i], &launches[i], 16);
  return launches.size();
}

#pragma GCC visibility pop
}
