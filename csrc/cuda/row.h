// One row a block, or a cluster of blocks.
//
// kChip: the row is copied to shared memory, spread over the blocks of the cluster, and read from
// global memory once. kGlobal: it is read twice. kSingly: read twice, element by element, where the
// rows do not begin alike, or the teacher has another type.
//
// A row is cut into vectors of 16 bytes at multiples of 16 bytes; the first and the last one may
// be partly outside of the row. All matrices cut a row alike (but in kSingly, from its start on).
#pragma once
#include "batch.h"

enum class Source { kChip, kGlobal, kSingly };

template <class R>
DLB_DEVICE R load_any(const void* base, int dtype, int64_t index) {
  if (dtype == DLB_FLOAT64) return R(load(static_cast<const double*>(base) + index));
  if (dtype == DLB_FLOAT32) return R(load(static_cast<const float*>(base) + index));
  if (dtype == DLB_BFLOAT16)
    return real_of(load_element(static_cast<const BFloat16*>(base) + index));
  return real_of(load_element(static_cast<const Float16*>(base) + index));
}

template <class T>
DLB_DEVICE uint4 load_edge(const T* row, int v, int phase, int C) {
  return gather_edge<T>(v * kVector<T> - phase, C, [&](int c) { return load_element(row + c); });
}

template <class T>
DLB_DEVICE void store_edge(T* row, const uint4& raw, int v, int phase, int C) {
  scatter_edge<T>(raw, v * kVector<T> - phase, C,
                  [&](int c, T element) { store_element(row + c, element); });
}

template <class T, Source kSource, bool kSmooth>
struct RowTeam {
  using R = Real<T>;
  static constexpr int kN = kVector<T>;

  const DlbCudaArgs& a;
  const RowFacts<R>& facts;
  const T* z;
  const void* p;  // of T but in kSingly
  T* next;        // null: not cached
  int C, phase;
  int thread, threads;  // in the team
  int p_slots;          // where the teacher's begin
  bool next_alike;
  uint4* chip;  // this block's vectors of z, then as many of p

  DLB_DEVICE int vectors() const { return (phase + C + kN - 1) / kN; }
  DLB_DEVICE bool whole(int v) const {
    return kSource != Source::kSingly && v * kN >= phase && v * kN + kN <= phase + C;
  }
  DLB_DEVICE uint4* slot_at(int slot) const { return chip + slot * blockDim.x + threadIdx.x; }

  // The vectors [first_whole, end_whole) lie in the row; beside them there may be one at each end.
  DLB_DEVICE int first_whole() const { return phase > 0; }
  DLB_DEVICE int end_whole() const { return (phase + C) / kN; }
  // visit(v) for those of this thread among the partial ones.
  template <class Visit>
  DLB_DEVICE void each_edge(Visit visit) const {
    const int end = end_whole();
    if (first_whole() > 0 && thread == 0) visit(0);
    if (end < vectors() && end >= first_whole() && end % threads == thread) visit(end);
  }

  // This thread's first whole vector.
  DLB_DEVICE int start_whole() const { return first_whole() <= thread ? thread : thread + threads; }

  // Starts the copy of a row into the slots of this thread; only it looks at them.
  DLB_DEVICE void fetch(const T* row, int first_slot) const {
    int slot = first_slot + (start_whole() != thread);
    for (int v = start_whole(); v < end_whole(); v += threads, ++slot) {
      copy_async16(slot_at(slot), row + (v * kN - phase));
    }
    each_edge([&](int v) { *slot_at(first_slot + v / threads) = load_edge(row, v, phase, C); });
  }

  template <bool kTeacher>
  DLB_DEVICE void teacher_of(int v, const uint4& raw, R (&out)[kN]) const {
    if constexpr (kTeacher && kSource == Source::kSingly) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int c = v * kN + j;
        out[j] = c < C ? load_any<R>(p, a.loss.last_dtype, c) : -infinity<R>();
      }
    } else if constexpr (kTeacher) {
      Element<T>::unpack(raw, out);
    }
  }

  // visit(v, raw, teacher) for the vectors of this thread.
  template <bool kTeacher, class Visit>
  DLB_DEVICE void each_vector(Visit visit) const {
    R teacher[kN] = {};
    const T* taught_by = static_cast<const T*>(p);
    if constexpr (kSource == Source::kChip) {
      int slot = 0;
      for (int v = thread; v < vectors(); v += threads, ++slot) {
        if constexpr (kTeacher) teacher_of<true>(v, *slot_at(p_slots + slot), teacher);
        visit(v, *slot_at(slot), teacher);
      }
    } else if constexpr (kSource == Source::kSingly) {
      for (int v = thread; v < vectors(); v += threads) {
        teacher_of<kTeacher>(v, {}, teacher);
        visit(v, load_edge(z, v, 0, C), teacher);
      }
    } else {
      for (int v = start_whole(); v < end_whole(); v += threads) {
        const int c = v * kN - phase;
        if constexpr (kTeacher) {
          teacher_of<true>(v, load(reinterpret_cast<const uint4*>(taught_by + c)), teacher);
        }
        visit(v, load(reinterpret_cast<const uint4*>(z + c)), teacher);
      }
      // Apart from the loop, which so has 16-byte loads alone.
      each_edge([&](int v) {
        if constexpr (kTeacher) teacher_of<true>(v, load_edge(taught_by, v, phase, C), teacher);
        visit(v, load_edge(z, v, phase, C), teacher);
      });
    }
  }

  DLB_DEVICE void weights_of(int v, R (&w)[kN]) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int c = v * kN + j - phase;
      w[j] = c >= 0 && c < C;
      if (w[j] != 0 && a.loss.weight != nullptr) w[j] = value_at<R>(a.loss.weight, c);
    }
  }

  DLB_DEVICE void store_vector(T* row, int v, const uint4& raw, bool alike = true) const {
    if (alike && whole(v)) {
      store<Cached::kStream>(reinterpret_cast<uint4*>(row + (v * kN - phase)), raw);
    } else {
      store_edge(row, raw, v, phase, C);
    }
  }

  // Whether this thread writes the vector with this class.
  DLB_DEVICE bool writes(int c) const { return c >= 0 && (c + phase) / kN % threads == thread; }

  DLB_DEVICE int label_vector() const { return facts.label >= 0 ? (facts.label + phase) / kN : -1; }

  // What precedes the first pass of a row on chip: it goes into the next cache, ...
  DLB_DEVICE void leave() const {
    int slot = 0;
    for (int v = thread; v < vectors(); v += threads, ++slot) {
      store_vector(next, v, *slot_at(slot), next_alike);
    }
  }

  // ... the label's class leaves it, so that no other term meets it, ...
  DLB_DEVICE R take_label(int first_slot) const {
    const int v = label_vector();
    if (v < 0 || v % threads != thread) return 0;
    uint4* slot = slot_at(first_slot + v / threads);
    T& element = reinterpret_cast<T*>(slot)[facts.label + phase - v * kN];
    const R label = real_of(element);
    element = element_of<T>(-infinity<R>());
    return label;
  }

  // ... and this thread's maximum is known.
  DLB_DEVICE R maximum(int slot) const {
    R x[kN];
#pragma unroll
    for (R& each : x) each = kFloor<R>;
    uint4 most = Element<T>::pack(x);
    for (int v = thread; v < vectors(); v += threads, ++slot) {
      most = larger_of<T>(most, *slot_at(slot));
    }
    Element<T>::unpack(most, x);
    return largest(kFloor<R>, x);
  }

  // First pass: this thread's part of the sums. Read twice, the row goes into the next cache; on
  // chip it has gone there, and `s` has the maxima and the label's logits.
  template <Kind kKind>
  DLB_DEVICE void sums(Sums<R>& s, Scales<R> scale) const {
    each_vector<kKind != Kind::kPlain>([&](int v, const uint4& raw, R(&teacher)[kN]) {
      if (kSource != Source::kChip && next != nullptr) store_vector(next, v, raw, next_alike);
      R x[kN], w[kN] = {};
      Element<T>::unpack(raw, x);
      if constexpr (kSmooth) weights_of(v, w);
      if constexpr (kSource == Source::kChip) {
#pragma unroll
        for (int j = 0; kSmooth && j < kN; ++j) {
          if (v * kN + j - phase == facts.label) w[j] = 0;
        }
        add_below<kKind, kSmooth>(s, x, teacher, w, scale);
        return;
      }
      if (v == label_vector()) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          if (v * kN + j - phase != facts.label) continue;
          s.z_label = x[j], s.p_label = teacher[j];
          x[j] = teacher[j] = -infinity<R>(), w[j] = 0;
        }
      }
      add<kKind, kSmooth>(s, x, teacher, w, scale);
    });
  }

  DLB_DEVICE void write_zeros(T* out) const {
    for (int v = thread; v < vectors(); v += threads) store_vector(out, v, {0, 0, 0, 0});
  }

  // Second pass: the gradient.
  template <Kind kKind>
  DLB_DEVICE void write(T* out, const Gradient<R>& g, Scales<R> scale) const {
    each_vector<kKind != Kind::kPlain>([&](int v, const uint4& raw, R(&teacher)[kN]) {
      R x[kN], w[kN] = {}, d[kN];
      Element<T>::unpack(raw, x);
      if constexpr (kSmooth) weights_of(v, w);
      gradient<kKind, kSmooth>(g, x, teacher, w, scale, d);
      if (v == label_vector()) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          if (v * kN + j - phase == facts.label) d[j] = g.at_label;
        }
      }
      store_vector(out, v, Element<T>::pack(d));
    });
  }
};

// The sums of all threads of the team, and the counts of the step.
template <Kind kKind, bool kSmooth, class R>
DLB_DEVICE void meet(Sums<R>& s, Tally<R>& tally, Scales<R> scale, bool count,
                     Meeting<R>& meeting) {
  const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;
  s = merged_lanes<kKind, kSmooth>(s, scale, 32);
  if (lane == 0) meeting.sums[threadIdx.x / 32] = s;
  if (count) {
    tally = tally_lanes(tally, 32);
    if (lane == 0) meeting.tally[threadIdx.x / 32] = tally;
  }
  __syncthreads();
  const unsigned warp = lane % kMaxWarps;
  s = warp < warps ? meeting.sums[warp] : no_sums<R>();
  s = merged_lanes<kKind, kSmooth>(s, scale, kMaxWarps);
  if (count) {
    tally = warp < warps ? meeting.tally[warp] : Tally<R>{0, 0, 0};
    tally = tally_lanes(tally, kMaxWarps);
  }
  if (cluster_size() == 1) return;
  if (threadIdx.x == 0) meeting.block_sums = s, meeting.block_tally = tally;
  cluster_arrive();
  cluster_wait();
  const unsigned rank = lane % kMaxCluster, blocks = cluster_size();
  Meeting<R>* peer = cluster_peer(&meeting, rank < blocks ? rank : 0);
  s = rank < blocks ? peer->block_sums : no_sums<R>();
  tally = rank < blocks ? peer->block_tally : Tally<R>{0, 0, 0};
  s = merged_lanes<kKind, kSmooth>(s, scale, kMaxCluster);
  if (count) tally = tally_lanes(tally, kMaxCluster);
  cluster_arrive();  // waited for at the end: no block may leave while another one reads it
}

// Blocks a multiprocessor that the registers must suffice for. Without a bound, the compiler spills
// a word to fit one more.
template <class T, Source kSource, bool kSmooth>
constexpr int kBlocks = sizeof(T) == 8                                              ? 1
                        : kSmooth || (kSource == Source::kGlobal && sizeof(T) == 2) ? 2
                                                                                    : 3;

template <class T, Source kSource, bool kSmooth>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kSource, kSmooth>)
    row_kernel(const __grid_constant__ KernelArgs k) {
  using R = Real<T>;
  DLB_SHARED(Meeting<R>, meeting);
  DLB_DYNAMIC_SHARED(chip);
  const DlbCudaArgs& a = k.given;
  bool done;
  const R dloss = gradient_scale<R>(a, done);
  if (done) return;
  const unsigned blocks = cluster_size(), rank = cluster_rank();
  const int64_t row = in_turn(blockIdx.x / blocks, a.loss.overlap, a.loss.B), first = first_row(a);
  RowFacts<R> facts = row_facts<T>(a, row, first);
  if (a.dloss != nullptr) facts.taught = facts.taught && step_counts<R>(k, {}).keep;
  const int64_t next_row = next_row_of(a, row, first);

  const T* z = static_cast<const T*>(a.loss.logits) + row * a.loss.logits_stride;
  const char* p = static_cast<const char*>(a.loss.last_logits);
  if (facts.taught) {
    const int size = a.loss.last_dtype == DLB_FLOAT64   ? 8
                     : a.loss.last_dtype == DLB_FLOAT32 ? 4
                                                        : 2;
    p += facts.teacher * a.loss.last_stride * size;
  }
  T* next = static_cast<T*>(a.loss.next_logits);
  if (next != nullptr) next = next_row < 0 ? nullptr : next + next_row * a.loss.C;
  const int phase =
      kSource == Source::kSingly ? 0 : int(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T));
  RowTeam<T, kSource, kSmooth> team{a,
                                    facts,
                                    z,
                                    p,
                                    next,
                                    int(a.loss.C),
                                    phase,
                                    int(rank * blockDim.x + threadIdx.x),
                                    int(blocks * blockDim.x),
                                    k.slots,
                                    k.next_alike,
                                    reinterpret_cast<uint4*>(chip)};
  if constexpr (kSource == Source::kChip) {
    team.fetch(z, 0);
    if (facts.taught) team.fetch(reinterpret_cast<const T*>(p), k.slots);
  }
  // While the row is on its way. The second label is a matter of shared memory, not of registers.
  if (a.loss.labels_b != nullptr && threadIdx.x == 0) {
    meeting.b = label_b_of<T>(a.loss, row, facts);
  }
  Tally<R> tally = tally_share<R>(k, team.thread, team.threads, first);
  Sums<R> s = no_sums<R>();
  if constexpr (kSource == Source::kChip) {
    copy_async_wait();
    if (next != nullptr) team.leave();
    s.z_label = team.take_label(0);
    s.z_max = team.maximum(0);
    if (facts.taught) {
      s.p_label = team.take_label(k.slots);
      s.p_max = team.maximum(k.slots);
    }
  }

  const bool cube = !kSmooth && facts.taught && facts.temperature == 3;
  Kind kind = cube ? Kind::kCube : facts.taught ? Kind::kTaught : Kind::kPlain;
  const Scales<R> scale = scales_of(facts.temperature, cube);
  if (kind == Kind::kPlain) {
    team.template sums<Kind::kPlain>(s, scale);
    meet<Kind::kPlain, kSmooth>(s, tally, scale, k.count, meeting);
  } else {
    if (kind == Kind::kTaught) {
      team.template sums<Kind::kTaught>(s, scale);
    } else if constexpr (!kSmooth) {
      team.template sums<Kind::kCube>(s, scale);
    }
    meet<Kind::kTaught, kSmooth>(s, tally, scale, k.count, meeting);
  }
  const StepCounts<R> n = step_counts(k, tally);
  if (facts.taught && !n.keep) {  // the guard objects: the row is its own teacher, without a share
    facts.taught = false;
    kind = cube ? Kind::kCube : Kind::kPlain;
    team.p = z, team.p_slots = 0;
  }

  const LabelB<R> b = a.loss.labels_b == nullptr ? no_label_b<R>() : meeting.b;
  Gradient<R> g;
  RowLoss<R> loss;
  const R smoothing = R(a.loss.label_smoothing);
  const R ce_share = facts.valid ? dloss * inverse_count(n.ce) : R(0);
  const R kl_share = dloss * inverse_count(n.kl);
  if (kind == Kind::kPlain) {
    loss = row_end<Kind::kPlain, kSmooth>(s, facts, b, scale, a.loss.C, smoothing, ce_share,
                                          kl_share, g);
  } else {
    loss = row_end<Kind::kTaught, kSmooth>(s, facts, b, scale, a.loss.C, smoothing, ce_share,
                                           kl_share, g);
  }
  if (team.writes(b.label)) {
    meeting.at_b = g.at_label_b;
    if (facts.taught) {
      const R p_b = load_any<R>(p, a.loss.last_dtype, b.label);
      meeting.at_b += divergence_gradient(g, scale, b.z, p_b);
    }
  }
  if (a.loss.dlogits != nullptr) {
    T* out = static_cast<T*>(a.loss.dlogits) + row * a.loss.dlogits_stride;
    if (!facts.valid && !facts.taught) {
      team.write_zeros(out);
    } else if (kind == Kind::kPlain) {
      team.template write<Kind::kPlain>(out, g, scale);
    } else if (kind == Kind::kTaught) {
      team.template write<Kind::kTaught>(out, g, scale);
    } else if constexpr (!kSmooth) {
      team.template write<Kind::kCube>(out, g, scale);
    }
    if (a.loss.labels_b != nullptr && team.writes(meeting.b.label)) {
      store_element(out + meeting.b.label, element_of<T>(meeting.at_b));
    }
  }
  if (rank == 0 && a.dloss == nullptr) {
    if (threadIdx.x == 0) cache_row_facts<R>(a, row, next_row, loss.fit);
    const R own[3] = {loss.ce, loss.kl, loss.distil};
    finish_launch(a, n, own, row, unsigned(a.loss.B), meeting);
  }
  if (blocks > 1) cluster_wait();
}
