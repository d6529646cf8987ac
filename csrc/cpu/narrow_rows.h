// Rows of a few vectors. There not only the scalars of a row cost more than its elements (see
// short_rows.h, which takes the same options), but also what is done per row with its vectors:
// branches on the label's place, sums over lanes, calls. So each pass goes over a whole batch, from
// padded copies of the rows, and the vectors of its rows are folded together.
#pragma once
#include "passes.h"
#include "short_rows.h"

namespace {

static_assert(kDlbNarrowBatch % kLanes<float> == 0, "a batch is whole vectors");
static_assert(kDlbNarrowBatch * kDlbNarrow <= kDlbShortElements, "a batch fits the buffers");

// One number for each row of a batch.
template <class R>
struct PerRow {
  alignas(64) R at[kDlbNarrowBatch] = {};  // what no row has set must not be slow to compute with

  R operator[](int j) const { return at[j]; }
  R& operator[](int j) { return at[j]; }
  Vector<R> load(int j) const { return ::load(at + j); }
  VD doubles(int j) const { return load_doubles(at + j); }
  void store(int j, Vector<R> v) { ::store(at + j, v); }

  // From one vector for each row.
  template <class Op>
  void fold(Vector<R>* vectors) {
    for (int j = 0; j < kDlbNarrowBatch; j += kLanes<R>) store(j, fold_rows<Op, R>(vectors + j));
  }
};

// Logits of the student or of the teacher.
template <class R>
struct Tops {
  PerRow<R> top, label;  // as loaded
};

template <class R>
struct NarrowBatch {
  int size = 0;
  int64_t row[kDlbNarrowBatch], label[kDlbNarrowBatch];
  const void *z[kDlbNarrowBatch], *u[kDlbNarrowBatch];
};

// All of a batch that the passes hand on. Rows in the buffers have `width` elements.
template <class R>
struct Work {
  int64_t C, width;
  Exponentials<R> e;  // before: the logits
  Tops<R> z, u;
  PerRow<R> x_y, u_y, hard_y, student_y, teacher_y;  // of the label's class
  PerRow<R> other, student, teacher, gap;            // sums without it
  PerRow<double> sum, ce, kl, distill;
  PerRow<double> hard, soft, q, label;  // coefficients of the gradient, and it at the label

  Exponentials<R> row(int j) const { return e.from(j * width); }
};

// Copies rows. Behind their end and at their label there is -inf then, so that the sums need to
// know of neither.
template <class T>
void load_rows(const void* const* rows, const int64_t* labels, int n, int64_t C, int64_t width,
               RealOf<T>* to, Tops<RealOf<T>>& tops) {
  using R = RealOf<T>;
  constexpr R none = -std::numeric_limits<R>::infinity();
  Vector<R> top[kDlbNarrowBatch] = {};
  for (int j = 0; j < n; ++j) {
    const T* from = static_cast<const T*>(rows[j]);
    R* row = to + j * width;
    Vector<R> row_top = splat<Vector<R>>(none);
    for (int64_t c = 0; c < C; c += kLanes<R>) {
      const Vector<R> v = c + kLanes<R> <= C ? load(from + c) : load_some(from + c, C - c, none);
      store(row + c, v);
      row_top = max_else_second(v, row_top);
    }
    top[j] = row_top;
  }
  tops.top.template fold<Max>(top);
  for (int j = 0; j < n; ++j) {
    R& label = to[j * width + labels[j]];
    tops.label[j] = label;
    label = none;
  }
}

// kMode: see mode_of.
template <class R, int kMode>
void sum_rows(Work<R>& w, int n, const Exponents<R> k) {
  using V = Vector<R>;
  V other[kDlbNarrowBatch] = {}, student[kDlbNarrowBatch] = {};
  V teacher[kDlbNarrowBatch] = {}, gap[kDlbNarrowBatch] = {};
  const int64_t width = w.width;
  for (int j = 0; j < n; ++j) {
    const Exponentials<R> e = w.row(j);
    const V z_top = splat<V>(w.z.top[j]), u_top = splat<V>(w.u.top[j]);
    TaughtSums<R> sum = {};
    for (int64_t c = 0; c < width; c += kLanes<R>) {
      const V x = load(e.first + c) - z_top;
      if constexpr (kMode == kFresh) {
        const V hard = exp_of(x, k.hard);
        store(e.first + c, hard);
        sum.other += hard;
      } else {
        const auto v = taught_vector<R, kMode>(x, load(e.teacher + c) - u_top, k, sum);
        store(e.first + c, v.first);
        store(e.teacher + c, v.teacher);
        if constexpr (kMode == 0) store(e.hard + c, v.hard);
      }
    }
    other[j] = sum.other;
    student[j] = sum.student;
    teacher[j] = sum.teacher;
    gap[j] = sum.gap;
  }
  w.other.template fold<Add>(other);
  if constexpr (kMode != kFresh) {
    w.student.template fold<Add>(student);
    w.teacher.template fold<Add>(teacher);
    w.gap.template fold<Add>(gap);
  }
}

// The gradient of the rows that have one: `to` is null for others.
template <class T, int kMode>
void write_rows(const Work<RealOf<T>>& w, int n, void* const* to, const int64_t* labels) {
  using R = RealOf<T>;
  const int64_t C = w.C;
  for (int j = 0; j < n; ++j) {
    T* row = static_cast<T*>(to[j]);
    if (!row) continue;
    const Exponentials<R> e = w.row(j);
    const Coefficients<R> k = {R(w.hard[j]), R(w.soft[j]), R(w.q[j]), 0};
    for (int64_t c = 0; c < C; c += kLanes<R>) {
      const Vector<R> gradient = gradient_of<R, kMode>(load(e.first + c), e, c, k);
      if (c + kLanes<R> <= C) {
        store(row + c, gradient);
      } else {
        store_some(row + c, gradient, C - c);
      }
    }
    store_one(row + labels[j], R(w.label[j]));
  }
}

template <class R>
using LoadRows = void (*)(const void* const*, const int64_t*, int, int64_t, int64_t, R*, Tops<R>&);
template <class R>
using SumRows = void (*)(Work<R>&, int, Exponents<R>);
template <class R>
using WriteRows = void (*)(const Work<R>&, int, void* const*, const int64_t*);

template <class R>
constexpr SumRows<R> kSumRows[] = {sum_rows<R, kFresh>, sum_rows<R, 0>, sum_rows<R, 1>,
                                   sum_rows<R, 2>,      sum_rows<R, 3>, sum_rows<R, 4>};
template <class T>
constexpr WriteRows<RealOf<T>> kWriteRows[] = {write_rows<T, kFresh>, write_rows<T, 0>,
                                               write_rows<T, 1>,      write_rows<T, 2>,
                                               write_rows<T, 3>,      write_rows<T, 4>};

template <class R>
LoadRows<R> rows_loader(int32_t dtype) {
  if constexpr (std::is_same_v<R, double>) {
    return load_rows<double>;
  } else {
    return dtype == DLB_BFLOAT16  ? load_rows<BFloat16>
           : dtype == DLB_FLOAT16 ? load_rows<Float16>
                                  : load_rows<float>;
  }
}

template <class T>
class NarrowRows {
  using R = RealOf<T>;

 public:
  static bool takes(const DlbJob& job) {
    return job.args->C <= kDlbNarrow && ShortRows<T>::takes(job);
  }

  NarrowRows(const DlbJob& job, char* scratch)
      : job_(job),
        a_(*job.args),
        temperature_(a_.temperatures ? dlb_real(a_, a_.temperatures, 0) : a_.temperature),
        alpha_(a_.alphas ? dlb_real(a_, a_.alphas, 0) : a_.alpha),
        taught_mode_(mode_of(temperature_)),
        exponents_(temperature_),
        load_teacher_(rows_loader<R>(a_.last_dtype)) {
    R* first = reinterpret_cast<R*>(scratch);
    w_.C = a_.C;
    w_.width = (a_.C + kLanes<R> - 1) / kLanes<R> * kLanes<R>;
    w_.e = {first, first + kDlbShortElements, first + 2 * kDlbShortElements};
  }

  // Rows [begin, end). `slow(i)` does a row that has no loss, or one with a NaN or an infinity.
  template <class Slow>
  void run(int64_t begin, int64_t end, Slow slow) {
    const int64_t u_bytes = a_.last_stride * size_of(a_.last_dtype);
    for (int64_t i = begin; i < end; ++i) {
      if (!dlb_row_valid(a_, i)) {
        slow(i);
        continue;
      }
      const int64_t t = i < a_.overlap && job_.teach ? dlb_teacher_row(a_, i) : -1;
      NarrowBatch<R>& b = t < 0 ? fresh_ : taught_;
      const int j = b.size++;
      b.row[j] = i;
      b.label[j] = a_.labels[i];
      b.z[j] = static_cast<const T*>(a_.logits) + i * a_.logits_stride;
      if (t >= 0) b.u[j] = static_cast<const char*>(a_.last_logits) + t * u_bytes;
      if (b.size == kDlbNarrowBatch) finish(b, slow);
    }
    finish(taught_, slow);
    finish(fresh_, slow);
  }

 private:
  template <class Slow>
  void finish(NarrowBatch<R>& b, Slow slow) {
    const int n = b.size;
    if (n == 0) return;
    const bool taught = &b == &taught_;
    const int mode = (taught ? taught_mode_ : kFresh) - kFresh;
    load_rows<T>(b.z, b.label, n, w_.C, w_.width, w_.e.first, w_.z);
    if (taught) load_teacher_(b.u, b.label, n, w_.C, w_.width, w_.e.teacher, w_.u);
    kSumRows<R>[mode](w_, n, exponents_);
    solve(n, taught);
    void* to[kDlbNarrowBatch];
    for (int j = 0; j < n; ++j) {
      const bool finite = std::isfinite(w_.sum[j]);
      const bool write = finite && a_.dlogits;
      to[j] = write ? static_cast<T*>(a_.dlogits) + b.row[j] * a_.dlogits_stride : nullptr;
      if (finite) put(b.row[j], b.z[j], j, taught);
    }
    if (a_.dlogits) kWriteRows<T>[mode](w_, n, to, b.label);
    for (int j = 0; j < n; ++j)
      if (!std::isfinite(w_.sum[j])) slow(b.row[j]);
    b.size = 0;
  }

  // row_ce, row_kl and row_label_gradient of all rows, of weight 1.
  void solve(int n, bool taught) {
    for (int j = 0; j < n; j += kLanes<R>) solve_labels(j, taught);
    const VD ce = splat<VD>(job_.grad_scale * job_.ce_inverse);
    for (int j = 0; j < n; j += kLanes<double>) {
      const VD other = w_.other.doubles(j), sum = other + w_.hard_y.doubles(j), hard = ce / sum;
      w_.sum.store(j, sum);
      w_.ce.store(j, log_of(sum) - w_.x_y.doubles(j));
      w_.hard.store(j, hard);
      w_.label.store(j, -hard * other);
      if (taught) solve_taught(j);
    }
  }

  void solve_labels(int j, bool taught) {
    const Vector<R> x = w_.z.label.load(j) - w_.z.top.load(j);
    w_.x_y.store(j, x);
    w_.hard_y.store(j, exp_of(x, exponents_.hard));
    if (!taught) return;
    const Vector<R> u = w_.u.label.load(j) - w_.u.top.load(j);
    w_.u_y.store(j, u);
    w_.student_y.store(j, exp_of(x, exponents_.soft));
    w_.teacher_y.store(j, exp_of(u, exponents_.soft));
  }

  void solve_taught(int j) {
    const VD scale = splat<VD>(job_.grad_scale * job_.kl_inverse * alpha_ * temperature_);
    const VD student_y = w_.student_y.doubles(j), teacher_y = w_.teacher_y.doubles(j);
    const VD gap = w_.gap.doubles(j) + teacher_y * (w_.u_y.doubles(j) - w_.x_y.doubles(j));
    const VD student = w_.student.doubles(j) + student_y;
    const VD per_teacher = 1 / (w_.teacher.doubles(j) + teacher_y);
    const VD soft = scale / student, q = scale * per_teacher;
    const VD kl = gap * per_teacher / temperature_ + log_of(student * per_teacher);
    w_.sum.store(j, w_.sum.load(j) + (gap - gap));  // finite only if both are
    w_.kl.store(j, kl);
    w_.distill.store(j, alpha_ == 0 ? VD{} : alpha_ * temperature_ * temperature_ * kl);
    w_.soft.store(j, soft);
    w_.q.store(j, q);
    w_.label.store(j, w_.label.load(j) + (soft * student_y - q * teacher_y));
  }

  void put(int64_t i, const void* z, int j, bool taught) const {
    const int64_t cached = i - (a_.B - a_.fresh), row_bytes = a_.C * int64_t(sizeof(T));
    if (cached >= 0 && a_.next_valid) a_.next_valid[cached] = 1;
    if (cached >= 0 && a_.next_logits)
      std::memcpy(static_cast<char*>(a_.next_logits) + cached * row_bytes, z, size_t(row_bytes));
    if (!job_.row_ce) return;
    job_.row_ce[i] = w_.ce[j];
    if (i >= a_.overlap) return;
    job_.row_kl[i] = taught ? w_.kl[j] : 0;
    job_.row_distill[i] = taught ? w_.distill[j] : 0;
  }

  const DlbJob& job_;
  const DlbArgs& a_;
  const double temperature_, alpha_;
  const int taught_mode_;
  const Exponents<R> exponents_;
  const LoadRows<R> load_teacher_;
  NarrowBatch<R> fresh_, taught_;
  Work<R> w_;
};

}  // namespace
