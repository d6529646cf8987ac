// Rows of few classes, several at a time: there the scalars of a row (logarithms, divisions, the
// label's exponentials) would cost more than its elements, so the rows of a batch share the lanes
// of vectors of double. Only without weight and smoothing, and with one temperature and one alpha.
#pragma once
#include "passes.h"

namespace {

static_assert(kDlbBatch % kLanes<double> == 0, "a batch is whole vectors");
static_assert(kDlbBlock <= kDlbShortElements, "a batch is one row at least");

// One number for each row of a batch.
struct Column {
  alignas(64) double rows[kDlbBatch] = {};  // what no row has set must not be slow to compute with

  double& operator[](int j) { return rows[j]; }
  double operator[](int j) const { return rows[j]; }
  VD load(int j) const { return ::load(rows + j); }
  void store(int j, VD v) { ::store(rows + j, v); }
};

template <class R>
struct Batch {
  R* buffers;  // (3, kDlbShortElements)
  bool taught;
  int size = 0;
  int64_t row[kDlbBatch];
  Ahead ahead[kDlbBatch];
  Column z_top, u_top, z_y, u_y;             // as loaded
  Column other, student, teacher, gap;       // sums without the label's class
  Column sum, ce, kl, hard, soft, q, label;  // what follows from these, see solve

  // Exponentials take the place of the logits.
  Scratch<R> scratch(int j, int64_t width) const {
    Scratch<R> s = {};
    s.z = s.first = buffers + j * width;
    s.u = s.teacher = s.z + kDlbShortElements;
    s.hard = s.u + kDlbShortElements;
    return s;
  }
};

// The label was taken out since the rows were loaded: an element that has just been stored cannot
// be read back as a part of a vector without a wait.
template <class R, int kMode>
void sum_batch(Batch<R>& b, int64_t n, int64_t width, const Exponents<R> k) {
  for (int j = 0; j < b.size; ++j) {
    const Scratch<R> s = b.scratch(j, width);
    if constexpr (kMode == kFresh) {
      b.other[j] = sum_fresh(s.z, n, b.z_top[j], k, b.ahead[j], s.first);
    } else {
      RowSums<double> sums = {};
      add_taught<R, kMode>(s, 0, n, b.z_top[j], b.u_top[j], k, b.ahead[j], sums);
      b.other[j] = sums.other;
      b.student[j] = sums.student;
      b.teacher[j] = sums.teacher;
      b.gap[j] = sums.gap;
    }
  }
}

template <class R>
using SumBatch = void (*)(Batch<R>&, int64_t, int64_t, Exponents<R>);
template <class R>
constexpr SumBatch<R> kSumBatch[] = {sum_batch<R, kFresh>, sum_batch<R, 0>, sum_batch<R, 1>,
                                     sum_batch<R, 2>,      sum_batch<R, 3>, sum_batch<R, 4>};

template <class T>
class ShortRows {
  using R = RealOf<T>;

 public:
  static bool takes(const DlbJob& job) {
    const DlbArgs& a = *job.args;
    return a.C <= kDlbBlock && job.ce_inverse > 0 && !a.weight && a.label_smoothing == 0 &&
           !(a.temperatures && a.temperature_step) && !(a.alphas && a.alpha_step);
  }

  ShortRows(const DlbJob& job, char* scratch)
      : job_(job),
        a_(*job.args),
        width_((a_.C + kLanes<R> - 1) / kLanes<R> * kLanes<R>),
        capacity_(width_ * kDlbBatch <= kDlbShortElements ? kDlbBatch
                                                          : int(kDlbShortElements / width_)),
        temperature_(a_.temperatures ? dlb_real(a_, a_.temperatures, 0) : a_.temperature),
        alpha_(a_.alphas ? dlb_real(a_, a_.alphas, 0) : a_.alpha),
        taught_mode_(mode_of(temperature_)),
        exponents_(temperature_),
        load_teacher_(loader<R>(a_.last_dtype)) {
    R* buffers = reinterpret_cast<R*>(scratch);
    fresh_.buffers = buffers;
    fresh_.taught = false;
    taught_.buffers = buffers + 3 * kDlbShortElements;
    taught_.taught = true;
  }

  // Rows [begin, end). `slow(i)` does a row that has no loss, or one with a NaN or an infinity.
  template <class Slow>
  void run(int64_t begin, int64_t end, Slow slow) {
    for (int64_t i = begin; i < end; ++i) {
      if (!dlb_row_valid(a_, i)) {
        slow(i);
        continue;
      }
      const int64_t t = i < a_.overlap && job_.teach ? dlb_teacher_row(a_, i) : -1;
      Batch<R>& b = t < 0 ? fresh_ : taught_;
      add(b, i, t);
      if (b.size == capacity_) finish(b, slow);
    }
    finish(taught_, slow);
    finish(fresh_, slow);
  }

 private:
  // As an index of tables.
  int mode(const Batch<R>& b) const { return (b.taught ? taught_mode_ : kFresh) - kFresh; }

  void add(Batch<R>& b, int64_t i, int64_t t) {
    constexpr R none = -std::numeric_limits<R>::infinity();
    const T* z = static_cast<const T*>(a_.logits) + i * a_.logits_stride;
    const int j = b.size++;
    const int64_t label = a_.labels[i];
    const Scratch<R> s = b.scratch(j, width_);
    b.row[j] = i;
    const int64_t z_size = sizeof(T);
    const int64_t z_next = capacity_ * a_.logits_stride * z_size;
    b.ahead[j] = {reinterpret_cast<uintptr_t>(z) + z_next, 0, z_size, 0};
    b.z_top[j] = load_block<T>(z, a_.C, s.z);
    b.z_y[j] = s.z[label];
    s.z[label] = none;
    const int64_t cached = i - (a_.B - a_.fresh);
    if (cached >= 0 && a_.next_logits)
      copy_bytes(static_cast<char*>(a_.next_logits) + cached * a_.C * int64_t(sizeof(T)),
                 reinterpret_cast<const char*>(z), a_.C * int64_t(sizeof(T)), job_.stream);
    if (!b.taught) return;
    const int64_t size = size_of(a_.last_dtype), stride = a_.last_stride * size;
    const char* u = static_cast<const char*>(a_.last_logits) + t * stride;
    b.ahead[j].u = reinterpret_cast<uintptr_t>(u) + capacity_ * stride;
    b.ahead[j].u_size = size;
    b.u_top[j] = load_teacher_(u, a_.C, s.u);
    b.u_y[j] = s.u[label];
    s.u[label] = none;
  }

  template <class Slow>
  void finish(Batch<R>& b, Slow slow) {
    if (b.size == 0) return;
    kSumBatch<R>[mode(b)](b, a_.C, width_, exponents_);
    for (int j = 0; j < b.size; j += kLanes<double>) solve(b, j);
    for (int j = 0; j < b.size; ++j) {
      if (std::isfinite(b.sum[j])) {
        put(b, j);
      } else {
        slow(b.row[j]);
      }
    }
    b.size = 0;
  }

  // row_ce, row_kl and row_label_gradient for the rows from j, of weight 1.
  void solve(Batch<R>& b, int j) const {
    const VD ce = splat<VD>(job_.grad_scale * job_.ce_inverse);
    const VD x_y = b.z_y.load(j) - b.z_top.load(j), other = b.other.load(j);
    const VD sum = other + exp_of(x_y, hard_);
    const VD hard = ce / sum;
    b.sum.store(j, sum);
    b.ce.store(j, log_of(sum) - x_y);
    b.hard.store(j, hard);
    b.label.store(j, -hard * other);
    if (b.taught) solve_taught(b, j, x_y);
  }

  void solve_taught(Batch<R>& b, int j, VD x_y) const {
    const VD scale = splat<VD>(job_.grad_scale * job_.kl_inverse * alpha_ * temperature_);
    const VD u_y = b.u_y.load(j) - b.u_top.load(j);
    const VD student_y = exp_of(x_y, soft_), teacher_y = exp_of(u_y, soft_);
    const VD student = b.student.load(j) + student_y, teacher = b.teacher.load(j) + teacher_y;
    const VD gap = b.gap.load(j) + teacher_y * (u_y - x_y);
    const VD soft = scale / student, q = scale / teacher;
    b.sum.store(j, b.sum.load(j) + (gap - gap));  // finite only if both are
    b.kl.store(j, gap / (teacher * temperature_) + log_of(student / teacher));
    b.soft.store(j, soft);
    b.q.store(j, q);
    b.label.store(j, b.label.load(j) + (soft * student_y - q * teacher_y));
  }

  void put(const Batch<R>& b, int j) const {
    const int64_t i = b.row[j], cached = i - (a_.B - a_.fresh);
    if (cached >= 0 && a_.next_valid) a_.next_valid[cached] = 1;
    if (job_.row_ce) {
      job_.row_ce[i] = b.ce[j];
      if (i < a_.overlap) {
        job_.row_kl[i] = b.taught ? b.kl[j] : 0;
        job_.row_distill[i] =
            b.taught && alpha_ != 0 ? alpha_ * temperature_ * temperature_ * b.kl[j] : 0;
      }
    }
    if (!a_.dlogits) return;
    T* to = static_cast<T*>(a_.dlogits) + i * a_.dlogits_stride;
    const Coefficients<R> k = {R(b.hard[j]), R(b.soft[j]), R(b.q[j]), 0};
    (job_.stream ? kWriteGradient<T, true> : kWriteGradient<T, false>)[mode(b)](
        b.scratch(j, width_), 0, a_.C, k, to);
    store_one(to + a_.labels[i], R(b.label[j]));
  }

  const DlbJob& job_;
  const DlbArgs& a_;
  const int64_t width_;  // of a row in the buffers
  const int capacity_;
  const double temperature_, alpha_;
  const int taught_mode_;
  const Exponents<R> exponents_;
  const LoadBlock<R> load_teacher_;
  const Exponent<VD, double> hard_{kLog2E}, soft_{kLog2E / temperature_};
  Batch<R> fresh_, taught_;
};

}  // namespace
