// Rows of few classes, several at a time: there the scalars of a row (logarithms, divisions, the
// label's exponentials) would cost more than its elements, so the rows of a batch share the lanes
// of vectors of double. Only without weight and smoothing, and with one temperature and one alpha.
#pragma once
#include "passes.h"

namespace {

static_assert(kDlbBatch % kLanes<double> == 0, "a batch is whole vectors");
static_assert(kDlbBlock <= kDlbShortElements, "a batch is one row at least");

constexpr int64_t kAlignElements = 256;    // shorter rows begin with whole vectors, aligned or not
constexpr int64_t kStreamElements = 1024;  // shorter rows are mostly ends, in lines that two share

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
  Block<R> block[kDlbBatch];
  Exponentials<R> e[kDlbBatch];
  Ahead ahead[kDlbBatch];
  Column z_top, u_top, z_y, u_y;             // as loaded
  Column other, student, teacher, gap;       // sums without the label's class
  Column sum, ce, kl, hard, soft, q, label;  // what follows from these, see solve

  // Exponentials take the place of logits that were converted.
  Exponentials<R> buffers_of(int j, int64_t width) const {
    R* first = buffers + j * width;
    return {first, first + kDlbShortElements, first + 2 * kDlbShortElements};
  }
};

template <class R, int kMode>
void sum_batch(Batch<R>& b, const Exponents<R> k) {
  for (int j = 0; j < b.size; ++j) {
    if constexpr (kMode == kFresh) {
      b.other[j] = sum_fresh(b.block[j], b.z_top[j], k, b.ahead[j], b.e[j].first);
    } else {
      RowSums<double> sums = {};
      add_taught<R, kMode>(b.block[j], b.e[j], b.z_top[j], b.u_top[j], k, b.ahead[j], sums);
      b.other[j] = sums.other;
      b.student[j] = sums.student;
      b.teacher[j] = sums.teacher;
      b.gap[j] = sums.gap;
    }
  }
}

template <class R>
using SumBatch = void (*)(Batch<R>&, Exponents<R>);
template <class R>
constexpr SumBatch<R> kSumBatch[] = {sum_batch<R, kFresh>, sum_batch<R, 0>, sum_batch<R, 1>,
                                     sum_batch<R, 2>,      sum_batch<R, 3>, sum_batch<R, 4>};

template <class T>
class ShortRows {
  using R = RealOf<T>;

 public:
  static bool takes(const DlbJob& job) {
    const DlbArgs& a = *job.args;
    return a.C <= kDlbBlock && job.ce_inverse > 0 && !a.weight && !a.labels_b &&
           a.label_smoothing == 0 && !(a.temperatures && a.temperature_step) &&
           !(a.alphas && a.alpha_step);
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
        stream_(job.stream && a_.C >= kStreamElements),
        in_place_(a_.dlogits && a_.dlogits != a_.logits && !stream_),
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
    const T* row = static_cast<const T*>(a_.logits) + i * a_.logits_stride;
    const int j = b.size++;
    const int64_t label = a_.labels[i], row_bytes = a_.C * int64_t(sizeof(T));
    b.row[j] = i;
    b.e[j] = b.buffers_of(j, width_);
    const int64_t z_next = capacity_ * a_.logits_stride * int64_t(sizeof(T));
    b.ahead[j] = {reinterpret_cast<uintptr_t>(row) + z_next, 0, sizeof(T), 0};
    const Loaded<R> z = load_block<T>(row, a_.C, b.e[j].first);
    b.block[j] = {z.at, nullptr, a_.C, 0, label};
    b.z_top[j] = z.top;
    b.z_y[j] = z.at[label];
    const int64_t cached = i - (a_.B - a_.fresh);
    if (cached >= 0 && a_.next_logits)
      copy_bytes(static_cast<char*>(a_.next_logits) + cached * row_bytes,
                 reinterpret_cast<const char*>(row), row_bytes, stream_);
    if (b.taught) add_teacher(b, j, t);
    if constexpr (std::is_same_v<T, R>) {
      if (in_place_) b.e[j].first = gradient_row(i);
      if (a_.C >= kAlignElements) b.block[j].head = row_head<R>(i, a_.logits_stride);
    }
  }

  void add_teacher(Batch<R>& b, int j, int64_t t) const {
    const int64_t size = size_of(a_.last_dtype), stride = a_.last_stride * size;
    const char* row = static_cast<const char*>(a_.last_logits) + t * stride;
    b.ahead[j].u = reinterpret_cast<uintptr_t>(row) + capacity_ * stride;
    b.ahead[j].u_size = size;
    const Loaded<R> u = load_teacher_(row, a_.C, b.e[j].teacher);
    b.block[j].u = u.at;
    b.u_top[j] = u.top;
    b.u_y[j] = u.at[b.block[j].label];
  }

  T* gradient_row(int64_t i) const { return static_cast<T*>(a_.dlogits) + i * a_.dlogits_stride; }

  template <class Slow>
  void finish(Batch<R>& b, Slow slow) {
    if (b.size == 0) return;
    kSumBatch<R>[mode(b)](b, exponents_);
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
    T* to = gradient_row(i);
    const Coefficients<R> k = {R(b.hard[j]), R(b.soft[j]), R(b.q[j]), 0};
    const auto write = stream_ ? kWriteGradient<T, true> : kWriteGradient<T, false>;
    write[mode(b)](b.e[j], 0, a_.C, k, a_.labels[i], to);
    store_one(to + a_.labels[i], R(b.label[j]));
  }

  const DlbJob& job_;
  const DlbArgs& a_;
  const int64_t width_;  // of a row in the buffers
  const int capacity_;
  const double temperature_, alpha_;
  const int taught_mode_;
  const bool stream_;
  const bool in_place_;  // exponentials in the gradient's place; `slow` must find the logits
  const Exponents<R> exponents_;
  const LoadBlock<R> load_teacher_;
  const Exponent<VD, double> hard_{kLog2E}, soft_{kLog2E / temperature_};
  Batch<R> fresh_, taught_;
};

}  // namespace
