// Many short rows a block, each by 1 to 32 neighbouring threads.
//
// The rows lie in shared memory as they lie in global memory: where those of a block are one piece,
// they move 16 bytes at a time, whatever C is. The gradient is written over the logits there and
// leaves in the same way.
//
// A row is cut into vectors at multiples of 16 bytes of shared memory. The first and the last one
// may lie in the next row too, so that their elements are read and written one by one.
#pragma once
#include "batch.h"

// Rows of C elements in shared memory, and this thread's place among them.
template <class T>
struct Tile {
  static constexpr int kN = kVector<T>;

  T* rows;
  int C;
  int own, lane, lanes;  // the row of this thread, and its vectors: lane, lane + lanes, ...

  DLB_DEVICE T& at(int c) const { return rows[own * C + c]; }

  DLB_DEVICE int phase() const { return own * C % kN; }
  DLB_DEVICE int vectors() const { return (phase() + C + kN - 1) / kN; }
  DLB_DEVICE int column(int v) const { return v * kN - phase(); }  // its first one, or one before
  DLB_DEVICE bool whole(int v) const { return column(v) >= 0 && column(v) + kN <= C; }
  DLB_DEVICE bool has_column(int c) const { return (c + phase()) / kN % lanes == lane; }

  // -inf outside of the row.
  DLB_DEVICE uint4 vector(int v) const {
    const T* from = &at(column(v));
    if (whole(v)) return *reinterpret_cast<const uint4*>(from);
    return gather_edge<T>(column(v), C, [&](int c) { return at(c); });
  }
  DLB_DEVICE void put(int v, const uint4& raw) const {
    if (whole(v)) {
      store_shared16(&at(column(v)), raw);
    } else {
      scatter_edge<T>(raw, column(v), C, [&](int c, T element) { at(c) = element; });
    }
  }

  // By vectors, as all that their threads do: nothing else orders them.
  DLB_DEVICE void fill(Real<T> value) const {
    Real<T> x[kN];
#pragma unroll
    for (Real<T>& each : x) each = value;
    for (int v = lane; v < vectors(); v += lanes) put(v, Element<T>::pack(x));
  }

  // `count` rows in one piece, by the whole block.
  DLB_DEVICE void fetch(const T* from, int count) const {
    const int all = count * C, whole = all / kVector<T>;
    for (int v = threadIdx.x; v < whole; v += kThreads) {
      copy_async16(rows + v * kVector<T>, from + v * kVector<T>);
    }
    const int i = whole * kVector<T> + threadIdx.x;
    if (i < all) rows[i] = load_element(from + i);
  }
  DLB_DEVICE void leave(T* to, int first, int count) const {
    const T* from = rows + first * C;
    const int all = count * C, whole = all / kVector<T>;
    for (int v = threadIdx.x; v < whole; v += kThreads) {
      const uint4 raw = reinterpret_cast<const uint4*>(from)[v];
      store<Cached::kStream>(reinterpret_cast<uint4*>(to) + v, raw);
    }
    const int i = whole * kVector<T> + threadIdx.x;
    if (i < all) store_element(to + i, from[i]);
  }
  // The own row, by its threads.
  DLB_DEVICE void fetch_row(const T* from) const {
    for (int c = lane; c < C; c += lanes) at(c) = load_element(from + c);
  }
  DLB_DEVICE void leave_row(T* to) const {
    for (int c = lane; c < C; c += lanes) store_element(to + c, at(c));
  }
};

// What a thread keeps in shared memory while it writes a row, since there is no register left.
template <class R>
struct AtLabelB {
  int label;  // -1: nothing for this thread
  R gradient;
};

template <class T, bool kSmooth>
struct TileRow {
  using R = Real<T>;
  static constexpr int kN = kVector<T>;

  const DlbCudaArgs& a;
  const RowFacts<R>& facts;
  const Tile<T>& z;
  const Tile<T>& p;
  bool exists;

  DLB_DEVICE void weights_of(int v, R (&w)[kN]) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int c = z.column(v) + j;
      w[j] = unsigned(c) < unsigned(z.C);
      if (w[j] != 0 && a.loss.weight != nullptr) w[j] = value_at<R>(a.loss.weight, c);
    }
  }

  // visit(v, logits, teacher, weights) for the vectors of this thread; -inf outside of the row.
  template <bool kTeacher, class Visit>
  DLB_DEVICE void each_vector(Visit visit) const {
    const int end = exists ? z.vectors() : 0;
    for (int v = z.lane; v < end; v += z.lanes) {
      R x[kN], teacher[kN] = {}, w[kN] = {};
      Element<T>::unpack(z.vector(v), x);
      if constexpr (kTeacher) Element<T>::unpack(p.vector(v), teacher);
      if constexpr (kSmooth) weights_of(v, w);
      visit(v, x, teacher, w);
    }
  }

  DLB_DEVICE bool has_label() const { return facts.label >= 0 && z.has_column(facts.label); }

  // The label's class leaves the tile, so that no other term meets it.
  DLB_DEVICE void take_label(Sums<R>& s) const {
    if (!has_label()) return;
    s.z_label = real_of(z.at(facts.label));
    z.at(facts.label) = element_of<T>(-infinity<R>());
    if (!facts.taught) return;
    s.p_label = real_of(p.at(facts.label));
    p.at(facts.label) = element_of<T>(-infinity<R>());
  }

  template <Kind kKind>
  DLB_DEVICE void sums(Sums<R>& s, Scales<R> scale) const {
    each_vector<kKind != Kind::kPlain>([&](int v, R(&x)[kN], R(&teacher)[kN], R(&w)[kN]) {
#pragma unroll
      for (int j = 0; kSmooth && j < kN; ++j) {
        if (z.column(v) + j == facts.label) w[j] = 0;
      }
      add<kKind, kSmooth>(s, x, teacher, w, scale);
    });
    s = merged_lanes<kKind, kSmooth>(s, scale, z.lanes);
  }

  template <Kind kKind>
  DLB_DEVICE void write(const Gradient<R>& g, Scales<R> scale) const {
    each_vector<kKind != Kind::kPlain>([&](int v, R(&x)[kN], R(&teacher)[kN], R(&w)[kN]) {
      R d[kN];
      gradient<kKind, kSmooth>(g, x, teacher, w, scale, d);
      z.put(v, Element<T>::pack(d));
    });
    if (has_label()) z.at(facts.label) = element_of<T>(g.at_label);
  }
};

template <class T, bool kSmooth>
__global__ void __launch_bounds__(kThreads, sizeof(Real<T>) == 8 ? 1 : 3)
    tile_kernel(const __grid_constant__ KernelArgs k) {
  using R = Real<T>;
  DLB_SHARED(Meeting<R>, meeting);
  DLB_DYNAMIC_SHARED(memory);
  const DlbCudaArgs& a = k.given;
  bool done;
  const R dloss = gradient_scale<R>(a, done);
  if (done) return;
  const int C = int(a.loss.C), lanes = k.lanes, height = kThreads / lanes;
  const int64_t first = first_row(a);
  const int64_t tile_index = in_turn(blockIdx.x, (a.loss.overlap + height - 1) / height, gridDim.x);
  const int64_t top = tile_index * height;
  const int count = a.loss.B - top < height ? int(a.loss.B - top) : height;
  const int own = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t row = top + own, next_row = next_row_of(a, row, first);
  const bool exists = own < count, heavy = top < a.loss.overlap;
  RowFacts<R> facts = row_facts<T>(a, row, first);
  if (a.dloss != nullptr) facts.taught = facts.taught && step_counts<R>(k, {}).keep;

  T* const tile = reinterpret_cast<T*>(memory);
  const int size = (height * C + kVector<T> - 1) / kVector<T> * kVector<T>;
  const Tile<T> z{tile, C, own, lane, lanes}, p{tile + size, C, own, lane, lanes};
  AtLabelB<R>* const kept =
      reinterpret_cast<AtLabelB<R>*>(tile + (a.loss.overlap > 0 ? 2 : 1) * size) + threadIdx.x;
  const T* logits = static_cast<const T*>(a.loss.logits);
  const T* last_logits = static_cast<const T*>(a.loss.last_logits);
  if (k.flat) {
    z.fetch(logits + top * C, count);
  } else if (exists) {
    z.fetch_row(logits + row * a.loss.logits_stride);
  }
  if (heavy && k.flat_last) {
    const int64_t taught = a.loss.overlap - top;
    p.fetch(last_logits + (top + first) * C, taught < count ? int(taught) : count);
  } else if (facts.taught) {
    p.fetch_row(last_logits + facts.teacher * a.loss.last_stride);
  }
  // While the rows are on their way.
  Tally<R> tally = tally_share<R>(k, threadIdx.x, kThreads, first);
  copy_async_wait();
  tally = tally_block(tally, meeting);
  const StepCounts<R> n = step_counts(k, tally);

  T* const next = static_cast<T*>(a.loss.next_logits);
  if (next != nullptr) {
    const int64_t old = a.loss.B - a.loss.fresh - top;  // rows of the tile that are not cached
    const int skip = old < 0 ? 0 : old < count ? int(old) : count;
    const bool flat = k.flat && k.next_alike;
    if (flat && skip < count) {
      z.leave(next + next_row_of(a, top + skip, first) * C, skip, count - skip);
    } else if (!flat && next_row >= 0) {
      z.leave_row(next + next_row * C);
    }
    __syncthreads();
  }

  if (!n.keep) facts.taught = false;
  if (heavy && exists && !facts.taught) p.fill(-infinity<R>());
  // The same kind for all rows of the block, since lanes of different rows meet.
  const bool cube = !kSmooth && heavy && a.loss.temperature_step == 0 &&
                    value_or<R>(a.loss.temperatures, a.loss.temperature) == 3;
  const Scales<R> scale = scales_of(cube ? R(3) : facts.temperature, cube);
  const TileRow<T, kSmooth> team{a, facts, z, p, exists};
  Sums<R> s = no_sums<R>();
  team.take_label(s);
  if (!heavy) {
    team.template sums<Kind::kPlain>(s, scale);
  } else if (!cube) {
    team.template sums<Kind::kTaught>(s, scale);
  } else if constexpr (!kSmooth) {
    team.template sums<Kind::kCube>(s, scale);
  }

  const LabelB<R> b = label_b_of<T>(a.loss, row, facts);
  Gradient<R> g;
  RowLoss<R> loss;
  const R smoothing = R(a.loss.label_smoothing);
  const R ce_share = facts.valid ? dloss * inverse_count(n.ce) : R(0);
  const R kl_share = dloss * inverse_count(n.kl);
  if (!heavy) {
    loss = row_end<Kind::kPlain, kSmooth>(s, facts, b, scale, C, smoothing, ce_share, kl_share, g);
  } else {
    loss = row_end<Kind::kTaught, kSmooth>(s, facts, b, scale, C, smoothing, ce_share, kl_share, g);
  }
  if (b.label >= 0 && facts.taught) {
    g.at_label_b += divergence_gradient(g, scale, b.z, real_of(p.at(b.label)));
  }
  if (a.loss.labels_b != nullptr) {
    *kept = {b.label >= 0 && z.has_column(b.label) ? b.label : -1, g.at_label_b};
  }
  if (a.loss.dlogits != nullptr) {
    T* const out = static_cast<T*>(a.loss.dlogits);
    if (!facts.valid && !facts.taught) {
      if (exists) z.fill(0);
    } else if (!heavy) {
      team.template write<Kind::kPlain>(g, scale);
    } else if (!cube) {
      team.template write<Kind::kTaught>(g, scale);
    } else if constexpr (!kSmooth) {
      team.template write<Kind::kCube>(g, scale);
    }
    if (a.loss.labels_b != nullptr && kept->label >= 0) {
      z.at(kept->label) = element_of<T>(kept->gradient);
    }
    __syncthreads();
    if (k.flat) {
      z.leave(out + top * C, 0, count);
    } else if (exists) {
      z.leave_row(out + row * a.loss.dlogits_stride);
    }
  }
  if (a.dloss != nullptr) return;
  const bool leads = exists && lane == 0;
  if (leads) cache_row_facts<R>(a, row, next_row, loss.fit);
  R own_sum[3] = {leads ? loss.ce : 0, leads ? loss.kl : 0, leads ? loss.distil : 0};
  total_of_block(own_sum, meeting);
  finish_launch(a, n, own_sum, tile_index, gridDim.x, meeting);
}
