// What concerns the whole batch: facts and counts of its rows, and the end of a launch, where the
// last block to finish adds up what all of them left, in a fixed order.
#pragma once
#include "elements.h"
#include "loss.h"
#include "row_sums.h"

constexpr int kThreads = 256;  // of a block, at most
constexpr int kMaxWarps = kThreads / 32;
constexpr int kMaxCluster = 16;

// The argument of all kernels: what Python gave, and what the plan decided.
struct KernelArgs {
  DlbCudaArgs given;
  bool count;       // rows are to be counted, or chunks of them added up
  int chunks;       // that the count kernel left; 0: each team counts all rows itself
  int lanes;        // tile: threads of a row
  int slots;        // row on chip: vectors of a thread
  bool flat;        // tile: the rows of a block are 16-byte vectors of one piece of memory, in
  bool flat_last;   // logits and dlogits; in last_logits
  bool next_alike;  // rows of next_logits begin at the same place of their 16 bytes as logits'
};

template <class R>
struct Tally {
  R ce;         // part of ce_count
  int taught;   // rows that are taught, the guard apart
  int differs;  // rows that the guard objects to
};

template <class R>
struct StepCounts {
  R ce, kl;
  bool keep;  // rows are taught in this step
  int taught, differs;
};

// For the threads of a block to meet in.
template <class R>
struct Meeting {
  Sums<R> sums[kMaxWarps];
  Tally<R> tally[kMaxWarps];
  Sums<R> block_sums;
  Tally<R> block_tally;
  LabelB<R> b;  // of the block's row; not of tiles
  R at_b;       // the gradient there, for the thread that writes it
  R total[kMaxWarps][3];
  bool last;
};

template <class R>
DLB_DEVICE R value_at(const void* address, int64_t index) {
  return load(static_cast<const R*>(address) + index);
}

template <class R>
DLB_DEVICE R value_or(const void* address, double value) {
  return address != nullptr ? value_at<R>(address, 0) : R(value);
}

// The first row of the cache's slot that teaches: `parity`, after forward the other one.
DLB_DEVICE int64_t first_row(const DlbCudaArgs& a) {
  if (a.parity == nullptr) return 0;
  const int slot = load(a.parity);
  return (a.dloss != nullptr ? 1 - slot : slot) * a.slot_rows;
}

// Whether row i < B has a teacher that may teach, and which.
DLB_DEVICE bool find_teacher(const DlbCudaArgs& a, int64_t i, int64_t first, int64_t& teacher) {
  if (i >= a.loss.overlap) return false;
  teacher = i;
  if (a.loss.teacher_rows != nullptr) teacher = load(a.loss.teacher_rows + i);
  if (teacher < 0) return false;
  teacher += first;
  return a.loss.last_valid == nullptr || load(a.loss.last_valid + teacher) != 0;
}

// Whether row i, of this label and maybe another one, has a cross-entropy.
DLB_DEVICE bool is_valid(const DlbArgs& a, int64_t i, int64_t label) {
  return label != a.ignore_index &&
         (a.labels_b == nullptr || load(a.labels_b + i) != a.ignore_index);
}

DLB_DEVICE bool is_class(const DlbArgs& a, int64_t label) { return label >= 0 && label < a.C; }

template <class R>
DLB_DEVICE void tally_row(const DlbCudaArgs& a, int64_t i, int64_t first, Tally<R>& t) {
  const int64_t label = load(a.loss.labels + i);
  const bool valid = is_valid(a.loss, i, label);
  if (a.loss.weight == nullptr || a.loss.labels_b != nullptr) {
    t.ce += valid;
  } else if (valid && is_class(a.loss, label)) {
    t.ce += value_at<R>(a.loss.weight, label);
  }
  int64_t teacher = 0;
  const bool may = find_teacher(a, i, first, teacher);
  t.taught += may && (valid || a.loss.distill_ignored);
  if (a.loss.last_labels != nullptr) {
    t.differs += may && load(a.loss.last_labels + teacher) != label;
  } else if (a.loss.teacher_rows != nullptr && i < a.loss.overlap) {
    t.differs += load(a.loss.teacher_rows + i) < 0;
  }
}

template <class R>
DLB_DEVICE void add_chunk(const KernelArgs& k, int i, Tally<R>& t) {
  const R* chunk = static_cast<const R*>(k.given.chunks) + i;
  t.ce += load(chunk);
  t.taught += int(load(chunk + kDlbChunks));
  t.differs += int(load(chunk + 2 * kDlbChunks));
}

// The part of a thread in the counts; `team` threads share the work.
template <class R>
DLB_DEVICE Tally<R> tally_share(const KernelArgs& k, int64_t thread, int64_t team, int64_t first) {
  Tally<R> t{0, 0, 0};
  if (!k.count) return t;
  if (k.chunks > 0) {
    for (int64_t i = thread; i < k.chunks; i += team) add_chunk(k, int(i), t);
  } else {
    for (int64_t i = thread; i < k.given.loss.B; i += team) tally_row(k.given, i, first, t);
  }
  return t;
}

template <class R>
DLB_DEVICE Tally<R> tally_lanes(Tally<R> t, unsigned lanes) {
  for (unsigned mask = 1; mask < lanes; mask *= 2) {
    t.ce += __shfl_xor_sync(~0u, t.ce, mask);
    t.taught += __shfl_xor_sync(~0u, t.taught, mask);
    t.differs += __shfl_xor_sync(~0u, t.differs, mask);
  }
  return t;
}

// All of a block; each thread gets the result.
template <class R>
DLB_DEVICE Tally<R> tally_block(Tally<R> t, Meeting<R>& meeting) {
  const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;
  t = tally_lanes(t, 32);
  if (lane == 0) meeting.tally[threadIdx.x / 32] = t;
  __syncthreads();
  const unsigned from = lane % kMaxWarps;
  t = from < warps ? meeting.tally[from] : Tally<R>{0, 0, 0};
  return tally_lanes(t, kMaxWarps);
}

template <class R>
DLB_DEVICE StepCounts<R> step_counts(const KernelArgs& k, const Tally<R>& tally) {
  const DlbCudaArgs& a = k.given;
  StepCounts<R> n{tally.ce, 0, true, tally.taught, tally.differs};
  if (a.dloss != nullptr) {
    n.ce = value_at<R>(a.loss.ce_count, 0);
    n.kl = value_at<R>(a.loss.kl_count, 0);
    n.keep = !(n.kl <= 0);
    return n;
  }
  if (a.loss.last_labels != nullptr) n.keep = n.differs == 0;
  if (!n.keep) n.taught = 0;
  n.kl = R(n.taught);
  if (a.loss.ce_count != nullptr) n.ce = value_at<R>(a.loss.ce_count, 0);
  if (a.loss.kl_count != nullptr) n.kl = n.keep ? value_at<R>(a.loss.kl_count, 0) : R(0);
  return n;
}

template <class R>
DLB_DEVICE R lam_of(const DlbArgs& a, int64_t row) {
  return a.lams == nullptr ? R(a.lam) : value_at<R>(a.lams, a.lam_step * row);
}

template <class T>
DLB_DEVICE Real<T> logit_at(const DlbArgs& a, int64_t row, int label) {
  return real_of(load_element(static_cast<const T*>(a.logits) + row * a.logits_stride + label));
}

// The likelier one of a valid row's two labels, `first` being one of them, or the only one with a
// share; -1 where something is out of range.
template <class T>
DLB_DEVICE int likelier_label(const DlbArgs& a, int64_t row, int first) {
  const int64_t given = load(a.labels_b + row);
  const int second = int(given);
  const Real<T> lam = lam_of<Real<T>>(a, row);
  if (first < 0 || !is_class(a, given) || !(lam >= 0 && lam <= 1)) return -1;
  if (first == second || lam == 1) return first;
  if (lam == 0) return second;
  return logit_at<T>(a, row, second) > logit_at<T>(a, row, first) ? second : first;
}

// The other one.
template <class T, class R = Real<T>>
DLB_DEVICE LabelB<R> label_b_of(const DlbArgs& a, int64_t row, const RowFacts<R>& f) {
  LabelB<R> b = no_label_b<R>();
  if (a.labels_b == nullptr || !f.valid || f.label < 0) return b;
  const int first = int(load(a.labels + row)), second = int(load(a.labels_b + row));
  const R lam = lam_of<R>(a, row);
  if (first == second || lam == 0 || lam == 1) return b;
  b.label = f.label == first ? second : first;
  b.share = f.label == first ? 1 - lam : lam;
  if (a.weight != nullptr) b.weight = value_at<R>(a.weight, b.label);
  b.z = logit_at<T>(a, row, b.label);
  return b;
}

template <class T, class R = Real<T>>
DLB_DEVICE RowFacts<R> row_facts(const DlbCudaArgs& a, int64_t row, int64_t first) {
  RowFacts<R> f{-1, false, false, 0, 1, 0, 1};
  if (row >= a.loss.B) return f;
  const int64_t label = load(a.loss.labels + row);
  f.valid = is_valid(a.loss, row, label);
  if (is_class(a.loss, label)) f.label = int(label);
  if (f.valid && a.loss.labels_b != nullptr) f.label = likelier_label<T>(a.loss, row, f.label);
  if (f.valid && f.label < 0) f.label_weight = nan<R>();
  if (f.valid && f.label >= 0 && a.loss.weight != nullptr) {
    f.label_weight = value_at<R>(a.loss.weight, f.label);
  }
  f.taught = find_teacher(a, row, first, f.teacher) && (f.valid || a.loss.distill_ignored);
  if (!f.taught) return f;
  f.temperature = R(a.loss.temperature);
  if (a.loss.temperatures != nullptr) {
    f.temperature = value_at<R>(a.loss.temperatures, a.loss.temperature_step * row);
  }
  f.alpha = R(a.loss.alpha);
  if (a.loss.alphas != nullptr) f.alpha = value_at<R>(a.loss.alphas, a.loss.alpha_step * row);
  // A bad value in device memory cannot be refused without a sync.
  if (!(f.temperature > 0 && f.temperature < infinity<R>())) f.temperature = nan<R>();
  if (!(f.alpha >= 0 && f.alpha < infinity<R>())) f.alpha = nan<R>();
  return f;
}

// The factor of the gradient to be written; `done` if the stored one already carries it.
template <class R>
DLB_DEVICE R gradient_scale(const DlbCudaArgs& a, bool& done) {
  const R expected = value_or<R>(a.loss.grad_scale, a.grad_scale);
  done = false;
  if (a.dloss == nullptr) return expected;
  const R scale = value_at<R>(a.dloss, 0);
  done = scale == expected && !a.always;
  return scale;
}

// Of `all` rows, or tiles of rows, the one whose turn it is, if the first ones are heavy: heavy and
// light ones side by side, so that they fill each other's gaps.
DLB_DEVICE int64_t in_turn(int64_t turn, int64_t heavy, int64_t all) {
  const int64_t pairs = heavy < all - heavy ? heavy : all - heavy;
  if (turn < 2 * pairs) return turn % 2 == 0 ? turn / 2 : heavy + turn / 2;
  return heavy > pairs ? turn - pairs : turn;
}

// The row of the next cache, -1 for none.
DLB_DEVICE int64_t next_row_of(const DlbCudaArgs& a, int64_t row, int64_t first) {
  const int64_t fresh_row = row - (a.loss.B - a.loss.fresh);
  if (fresh_row < 0 || row >= a.loss.B) return -1;
  return fresh_row + (a.parity != nullptr ? a.slot_rows - first : 0);
}

// What a row leaves beyond its gradient, by one thread.
template <class R>
DLB_DEVICE void cache_row_facts(const DlbCudaArgs& a, int64_t row, int64_t next_row, bool fit) {
  if (next_row < 0) return;
  store(a.loss.next_labels + next_row, load(a.loss.labels + row));
  store(a.loss.next_valid + next_row, uint8_t(fit));
}

template <class R>
DLB_DEVICE void total_of_block(R (&sum)[3], Meeting<R>& meeting) {
  for (R& x : sum) {
    for (unsigned mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
  }
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < 3; ++i) meeting.total[threadIdx.x / 32][i] = sum[i];
  }
  __syncthreads();
  for (int i = 0; i < 3; ++i) {
    sum[i] = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum[i] += meeting.total[warp][i];
  }
}

template <class R>
DLB_DEVICE R mean_of(R sum, R count) {
  return count <= 0 ? R(0) : sum * inverse_count(count);
}

// Loss, parts and stats of the launch, from its totals of ce, kl and distil; by one thread.
template <class R>
DLB_DEVICE void write_results(const DlbCudaArgs& a, const StepCounts<R>& n, const R (&sum)[3]) {
  const R ce = mean_of(sum[0], n.ce), kl = mean_of(sum[1], n.kl);
  store(static_cast<R*>(a.loss.loss), ce + mean_of(sum[2], n.kl));
  R* parts = static_cast<R*>(a.loss.parts);
  store(parts, ce), store(parts + 1, kl), store(parts + 2, n.ce), store(parts + 3, n.kl);
  if (int64_t* stats = a.loss.stats; stats != nullptr) {
    const int64_t add[3] = {n.taught, n.differs, a.loss.overlap - n.taught - n.differs};
    for (int i = 0; i < 3; ++i) store(stats + i, load(stats + i) + add[i]);
  }
  if (a.parity != nullptr) store(a.parity, 1 - load(a.parity));
}

// All threads of one block of `blocks` come, with the block's sums in thread 0.
template <class R>
DLB_DEVICE void finish_launch(const DlbCudaArgs& a, const StepCounts<R>& n, const R (&own)[3],
                              int64_t block, unsigned blocks, Meeting<R>& meeting) {
  R* sums = static_cast<R*>(a.sums);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 3; ++i) store(sums + i * a.loss.B + block, own[i]);
    __threadfence();
    // Wraps around to 0 for the next launch: a plain store could be seen late by it.
    meeting.last = atomicInc(a.counter, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!meeting.last) return;
  R total[3] = {0, 0, 0};
  for (unsigned i = threadIdx.x; i < blocks; i += blockDim.x) {
    for (int j = 0; j < 3; ++j) total[j] += load<Cached::kGlobal>(sums + j * a.loss.B + i);
  }
  total_of_block(total, meeting);
  if (threadIdx.x == 0) write_results(a, n, total);
}

// Counts for batches that are too long for each team to count for itself.
template <class R>
__global__ void __launch_bounds__(kThreads, 6) count_kernel(const __grid_constant__ KernelArgs k) {
  DLB_SHARED(Meeting<R>, meeting);
  const DlbCudaArgs& a = k.given;
  const int64_t first = first_row(a), step = int64_t(gridDim.x) * kThreads;
  Tally<R> t{0, 0, 0};
#pragma unroll 2
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < a.loss.B; i += step) {
    tally_row(a, i, first, t);
  }
  t = tally_block(t, meeting);
  if (threadIdx.x != 0) return;
  R* chunk = static_cast<R*>(a.chunks) + blockIdx.x;
  store(chunk, t.ce);
  store(chunk + kDlbChunks, R(t.taught));
  store(chunk + 2 * kDlbChunks, R(t.differs));
}
