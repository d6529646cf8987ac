// The entry point: checks labels, counts rows, chooses the instruction set, runs the rows on
// torch's own thread pool and adds up the parts in row order.
#include <dlfcn.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../row_math.h"
#include "loss.h"
#include "rows.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

constexpr int64_t kStreamBytes = 16 << 20;  // a gradient of this size stays in no cache
constexpr int64_t kLargePageBytes = 4 << 20;
constexpr uintptr_t kPageBytes = 4096;
constexpr int64_t kChunkElements = 65536;   // of a row range that one thread takes at a time
constexpr int64_t kRowElements = 80;        // what a row costs besides its elements, as elements
constexpr int64_t kThreadElements = 20480;  // below this one thread is faster

// ---- instruction set ----

#if defined(__x86_64__)
constexpr DlbRows kLevels[] = {dlb_rows_baseline, dlb_rows_v3, dlb_rows_v4};

// What the operating system saves on a task switch: 0x6 for AVX, 0xe6 for AVX-512 too.
bool os_saves(uint32_t state) {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & state) == state;
}

bool has(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

int best_level() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  if (!has(ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C | bit_MOVBE) || !os_saves(0x6)) return 0;
  if (!__get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) || !has(ecx, bit_LZCNT)) return 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
  if (!has(ebx, bit_AVX2 | bit_BMI | bit_BMI2)) return 0;
  const uint32_t v4 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
  return has(ebx, v4) && os_saves(0xe6) ? 2 : 1;
}
#else
constexpr DlbRows kLevels[] = {dlb_rows_baseline};
int best_level() { return 0; }
#endif

std::atomic<int> g_level{-1};

int level() {
  int chosen = g_level.load(std::memory_order_relaxed);
  if (chosen < 0) g_level = chosen = best_level();
  return chosen;
}

// ---- before the rows ----

bool out_of_range(const DlbArgs& a, int64_t label) { return uint64_t(label) >= uint64_t(a.C); }

int64_t first_bad_label(const DlbArgs& a) {
  int bad = a.labels_b != nullptr;
  for (int64_t i = 0; i < a.B; ++i)  // without branches first: usually none is
    bad |= int(a.labels[i] != a.ignore_index) & int(out_of_range(a, a.labels[i]));
  if (!bad) return -1;
  for (int64_t i = 0; i < a.B; ++i) {
    const bool bad_b = a.labels_b && out_of_range(a, a.labels_b[i]);
    if (dlb_row_valid(a, i) && (bad_b || out_of_range(a, a.labels[i]))) return i;
  }
  return -1;
}

int64_t valid_rows(const DlbArgs& a, int64_t end) {
  int64_t count = 0;
  if (!a.labels_b)
    for (int64_t i = 0; i < end; ++i) count += a.labels[i] != a.ignore_index;
  else
    for (int64_t i = 0; i < end; ++i) count += dlb_row_valid(a, i);
  return count;
}

double valid_count(const DlbArgs& a) {
  if (!a.weight || a.labels_b) return double(valid_rows(a, a.B));
  double count = 0;
  for (int64_t i = 0; i < a.B; ++i)
    if (dlb_row_valid(a, i)) count += dlb_real(a, a.weight, a.labels[i]);
  return count;
}

struct Overlap {
  int64_t matched = 0, mismatched = 0;
  bool dropped = false;  // by the guard
};

Overlap count_overlap(const DlbArgs& a) {
  Overlap o;
  if (!a.teacher_rows && !a.last_labels && !a.last_valid) {
    o.matched = a.distill_ignored ? a.overlap : valid_rows(a, a.overlap);
    return o;
  }
  for (int64_t i = 0; i < a.overlap; ++i) {
    const int64_t t = dlb_teacher_row(a, i);
    if (a.teacher_rows) o.mismatched += a.teacher_rows[i] < 0;
    if (a.last_labels && t >= 0) o.mismatched += a.last_labels[i] != a.labels[i];
    o.matched += t >= 0 && dlb_row_learns(a, i);
  }
  o.dropped = a.last_labels && o.mismatched > 0;
  if (o.dropped) o.matched = 0;
  return o;
}

double weight_sum(const DlbArgs& a) {
  if (!a.weight) return double(a.C);
  if (a.label_smoothing == 0) return 0;  // not asked for
  double sum = 0;
  for (int64_t c = 0; c < a.C; ++c) sum += dlb_real(a, a.weight, c);
  return sum;
}

// Asks for large pages under a large output: where torch just allocated it, the page faults of
// small ones would take longer than the kernel.
void advise_large_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (!p || bytes < kLargePageBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPageBytes - 1) / kPageBytes;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)) / kPageBytes;
  madvise(reinterpret_cast<void*>(begin * kPageBytes), (end - begin) * kPageBytes, MADV_HUGEPAGE);
#endif
}

// Whether the middle of an output has no page yet. The kernel then clears one, in the caches, as it
// is first written: a store past them would send that page to memory too.
bool is_fresh(const void* p, int64_t bytes) {
#if defined(__linux__)
  if (!p) return false;
  const uintptr_t page = (reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes) / 2) / kPageBytes;
  unsigned char present = 1;
  return mincore(reinterpret_cast<void*>(page * kPageBytes), 1, &present) == 0 && !(present & 1);
#else
  return false;
#endif
}

// ---- the rows, on several threads ----

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// torch's OpenMP. To link one of our own would put a second pool beside it.
GompParallel gomp_parallel() {
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

struct Team {
  const DlbJob* job;
  DlbRows rows;
  int64_t chunk;
  size_t scratch_bytes;
  char* scratch;
  std::atomic<int64_t> next_row{0};
  std::atomic<int> next_member{0};
};

// Rows are taken from the front, where the dear ones are; each leaves its parts in its own place,
// so that it does not matter who takes it.
void work(void* data) {
  Team& team = *static_cast<Team*>(data);
  const int64_t B = team.job->args->B;
  char* scratch = team.scratch + size_t(team.next_member.fetch_add(1)) * team.scratch_bytes;
  for (;;) {
    const int64_t begin = team.next_row.fetch_add(team.chunk, std::memory_order_relaxed);
    if (begin >= B) return;
    team.rows(*team.job, begin, begin + team.chunk < B ? begin + team.chunk : B, scratch);
  }
}

int team_size(const DlbArgs& a) {
  if (a.threads <= 1 || a.B * (a.C + kRowElements) < kThreadElements || !gomp_parallel()) return 1;
  return a.threads < a.B ? a.threads : int(a.B);
}

void run_rows(const DlbJob& job, int threads, size_t scratch_bytes, char* scratch) {
  const int64_t even = (job.args->B + 4 * threads - 1) / (4 * threads);
  int64_t chunk = 1 + kChunkElements / (job.args->C + kRowElements);
  if (chunk > even) chunk = even;
  constexpr int batch = kDlbNarrowBatch;
  if (chunk > batch / 2) chunk = (chunk + batch - 1) / batch * batch;
  Team team{&job, kLevels[level()], threads == 1 ? job.args->B : chunk, scratch_bytes, scratch};
  if (threads == 1) {
    work(&team);
  } else {
    gomp_parallel()(work, &team, unsigned(threads), 0);
  }
}

// ---- after the rows ----

void put_real(const DlbArgs& a, void* p, int64_t i, double x) {
  if (a.dtype == DLB_FLOAT64) {
    static_cast<double*>(p)[i] = x;
  } else {
    static_cast<float*>(p)[i] = float(x);
  }
}

double mean_of(const double* rows, int64_t n, double inverse) {
  if (inverse == 0) return 0;
  double sum[4] = {};  // each addition waits for the one before
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] += rows[i + k];
  for (; i < n; ++i) sum[0] += rows[i];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) * inverse;
}

void put_results(const DlbJob& job, double ce_count, double kl_count) {
  const DlbArgs& a = *job.args;
  const double ce = mean_of(job.row_ce, a.B, job.ce_inverse);
  const double kl = mean_of(job.row_kl, a.overlap, job.kl_inverse);
  const double parts[4] = {ce, kl, ce_count, kl_count};
  put_real(a, a.loss, 0, ce + mean_of(job.row_distill, a.overlap, job.kl_inverse));
  for (int i = 0; i < 4; ++i) put_real(a, a.parts, i, parts[i]);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int64_t dlb_cpu_loss(const DlbArgs* args) {
  const DlbArgs& a = *args;
  const int64_t bad = first_bad_label(a);
  if (bad >= 0) return bad;

  const int threads = team_size(a);
  const size_t scratch_bytes = dlb_scratch_bytes(a);
  const size_t rows_bytes = aligned(size_t(a.B + 2 * a.overlap) * sizeof(double));
  std::unique_ptr<char, Free> memory(static_cast<char*>(
      std::aligned_alloc(64, aligned(rows_bytes + size_t(threads) * scratch_bytes))));
  if (!memory) return kDlbNoMemory;

  const Overlap overlap = count_overlap(a);
  const double ce_count = a.ce_count ? dlb_real(a, a.ce_count, 0) : valid_count(a);
  double kl_count = a.kl_count ? dlb_real(a, a.kl_count, 0) : double(overlap.matched);
  if (overlap.dropped) kl_count = 0;
  double* rows = reinterpret_cast<double*>(memory.get());
  DlbJob job = {&a, weight_sum(a), inverse_count(ce_count), inverse_count(kl_count)};
  job.grad_scale = a.grad_scale ? dlb_real(a, a.grad_scale, 0) : 1;
  job.teach = job.kl_inverse != 0;
  const int64_t row_bytes = a.C * (a.dtype == DLB_FLOAT64 ? 8 : a.dtype == DLB_FLOAT32 ? 4 : 2);
  job.stream = a.B * row_bytes >= kStreamBytes && !is_fresh(a.dlogits, a.B * row_bytes);
  if (a.dlogits != a.logits) advise_large_pages(a.dlogits, a.B * row_bytes);
  advise_large_pages(a.next_logits, a.fresh * row_bytes);
  if (a.loss) {
    job.row_ce = rows;
    job.row_kl = rows + a.B;
    job.row_distill = job.row_kl + a.overlap;
  }
  run_rows(job, threads, scratch_bytes, memory.get() + rows_bytes);

  if (a.loss) put_results(job, ce_count, kl_count);
  if (a.next_labels)
    std::memcpy(a.next_labels, a.labels + (a.B - a.fresh), size_t(a.fresh) * sizeof(int64_t));
  if (a.stats) {
    a.stats[0] += overlap.matched;
    a.stats[1] += overlap.mismatched;
    a.stats[2] += a.overlap - overlap.matched - overlap.mismatched;
  }
  return kDlbDone;
}

int dlb_cpu_has_thread_pool() { return gomp_parallel() != nullptr; }

int dlb_cpu_force_level(int level_wanted) {
  const int best = best_level();
  g_level = level_wanted < 0 || level_wanted > best ? best : level_wanted;
  return g_level;
}
