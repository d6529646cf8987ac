// The row kernels: loss and gradient of one row after the other, equations (1) to (6) of
// dlb_fused/reference.py.
//
// A row is read once, in blocks that stay in L1. The exponentials of a block are taken against the
// maximum so far and stored, where they can in the gradient's own place, and the sums are rescaled
// when the maximum rises. The gradient is then a combination of the stored exponentials. The
// label's class is left out of the sums and added as a scalar: (5) needs the sum over the other
// classes, and no digits may cancel.
//
// Rows of one block without further options go through short_rows.h, several at a time, and those
// of a few vectors through narrow_rows.h.
//
// Compiled once per instruction set with another DLB_ROWS; all else here is internal.
#include "rows.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../row_math.h"
#include "narrow_rows.h"
#include "passes.h"
#include "short_rows.h"

namespace {

// ---- one row ----

// R is the type of the arithmetic, T that of logits and dlogits.
template <class T>
class RowKernel {
  using R = RealOf<T>;
  static constexpr bool kDirect = std::is_same_v<T, R>;  // nothing needs to be converted

 public:
  RowKernel(const DlbJob& job, char* scratch)
      : job_(job),
        a_(*job.args),
        s_(scratch, a_.dlogits ? a_.C : kDlbBlock),
        load_teacher_(loader<R>(a_.last_dtype)) {
    target_ = target_of({1, 1}, {});
  }

  void run(int64_t i) {
    valid_ = dlb_row_valid(a_, i);
    if (i >= a_.B - a_.fresh) cached_ = i - (a_.B - a_.fresh);
    row_ = i;
    z_ = static_cast<const T*>(a_.logits) + i * a_.logits_stride;
    const bool learns = i < a_.overlap && job_.teach && dlb_row_learns(a_, i);
    const int64_t t = learns ? dlb_teacher_row(a_, i) : -1;
    u_ = t < 0 ? nullptr : at(a_.last_logits, t * a_.last_stride, a_.last_dtype);
    if (u_ || (valid_ && job_.ce_inverse != 0)) {
      compute();
    } else {
      skip();
    }
  }

 private:
  static const char* at(const void* p, int64_t i, int32_t dtype) {
    return static_cast<const char*>(p) + i * size_of(dtype);
  }

  T* gradient_row() const { return static_cast<T*>(a_.dlogits) + row_ * a_.dlogits_stride; }

  double setting(const void* values, int32_t step, double value) const {
    return values ? dlb_real(a_, values, row_ * step) : value;
  }

  // A row without loss: gradient 0, whatever it holds.
  void skip() {
    if (cached_ >= 0) {
      R top = -std::numeric_limits<R>::infinity();
      bool nan = false;
      for (int64_t at = 0, n; at < a_.C; at += n) {
        n = block_length(at);
        const Loaded<R> z = load_block<T>(z_ + at, n, s_.z);
        top = z.top > top ? z.top : top;
        nan = nan || has_nan(z.at, n);
        cache_block(at, n);
      }
      finish_cache(!nan && std::isfinite(top));
    }
    if (a_.dlogits) std::memset(gradient_row(), 0, size_t(a_.C) * sizeof(T));
    if (job_.row_ce) put_losses(0, 0, 0);
  }

  // The first is longer by what comes before the first whole vector.
  int64_t block_length(int64_t at) const {
    const int64_t n = kDlbBlock + (at == 0 ? head_ : 0);
    return a_.C - at < n ? a_.C - at : n;
  }

  void cache_block(int64_t at, int64_t n) const {
    if (cached_ < 0 || !a_.next_logits) return;
    char* to = static_cast<char*>(a_.next_logits) + (cached_ * a_.C + at) * int64_t(sizeof(T));
    copy_bytes(to, reinterpret_cast<const char*>(z_ + at), n * int64_t(sizeof(T)), job_.stream);
  }

  void finish_cache(bool valid) {
    if (cached_ >= 0 && a_.next_valid) a_.next_valid[cached_] = valid;
    cached_ = -1;
  }

  void put_losses(double ce, double kl, double distill) const {
    job_.row_ce[row_] = ce;
    if (row_ < a_.overlap) {
      job_.row_kl[row_] = kl;
      job_.row_distill[row_] = distill;
    }
  }

  void compute() {
    if (u_) set_temperature(setting(a_.temperatures, a_.temperature_step, a_.temperature));
    take_labels();
    choose_mode();
    place_exponentials();
    sum_row();
    finish_cache(std::isfinite(z_top_) && sums_.other + sums_.e_y < INFINITY);
    const double alpha = u_ ? setting(a_.alphas, a_.alpha_step, a_.alpha) : 0;
    if (job_.row_ce) {
      const double kl = u_ ? row_kl(sums_, temperature_) : 0;
      const double distill = alpha == 0 ? 0 : alpha * temperature_ * temperature_ * kl;
      put_losses(valid_ ? row_ce(sums_, target_, job_.weight_sum) : 0, kl, distill);
    }
    if (a_.dlogits) write_row(alpha);
  }

  bool weighted_smoothing() const { return a_.weight && a_.label_smoothing > 0; }

  void set_temperature(double temperature) {
    if (temperature == temperature_) return;
    temperature_ = temperature;
    exponents_ = Exponents<R>(temperature);
  }

  RowTarget<double> target_of(Label<double> y, Label<double> b) const {
    return row_target(a_.label_smoothing, double(a_.C), y, b, job_.weight_sum);
  }

  Label<double> label_of(double share, int64_t c) const {
    return {share, a_.weight ? dlb_real(a_, a_.weight, c) : 1};
  }

  double logit(int64_t c) const { return load_some(z_ + c, 1, R(0))[0]; }

  void take_labels() {
    label_ = a_.labels[row_];
    label_b_ = -1;
    if (!valid_) {  // distilled all the same; any class can be left out of the sums
      label_ = 0;
      target_ = {};
    } else if (a_.labels_b) {
      take_two_labels(a_.labels_b[row_], setting(a_.lams, a_.lam_step, a_.lam));
    } else if (a_.weight || a_.distill_ignored) {
      target_ = target_of(label_of(1, label_), {});
    }
  }

  // label_ is then the likelier one, and b the other one, unless it has no share.
  void take_two_labels(int64_t b, double lam) {
    if (label_ == b) lam = 1;
    if (lam == 0 || (lam < 1 && logit(b) > logit(label_))) {
      std::swap(label_, b);
      lam = 1 - lam;
    }
    const auto y = label_of(lam, label_), other = label_of(1 - lam, b);
    target_ = target_of(y, other);
    if (lam == 1) return;
    target_b_ = target_of(other, y);
    label_b_ = b;
    z_b_ = logit(b);  // now, since the gradient may take its place
    if (u_) u_b_ = *load_teacher_(u_ + b * size_of(a_.last_dtype), 1, s_.u).at;
  }

  void choose_mode() { mode_ = !u_ ? kFresh : weighted_smoothing() ? 0 : mode_of(temperature_); }

  // In the gradient's place, where that has their type and is not written past the caches.
  // Elsewhere vectors begin as in the row of logits.
  void place_exponentials() {
    head_ = 0;
    e_ = {s_.first, s_.teacher, s_.hard};
    if constexpr (kDirect) {
      head_ = row_head<R>(row_, a_.logits_stride);
      e_ = e_.from((kLanes<R> - head_) % kLanes<R>);
      if (a_.dlogits && !job_.stream) e_.first = gradient_row();
    }
  }

  void sum_row() {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    sums_ = {};
    z_top_ = u_top_ = -infinity;
    z_y_ = u_y_ = weight_so_far_ = 0;
    runs_ = 0;
    for (int64_t at = 0, n; at < a_.C; at += n) {
      n = block_length(at);
      const Loaded<R> z = load_block<T>(z_ + at, n, s_.z);
      Loaded<R> u = {nullptr, -std::numeric_limits<R>::infinity()};
      if (u_) u = load_teacher_(u_ + at * size_of(a_.last_dtype), n, s_.u);
      cache_block(at, n);
      raise_tops(at, z.top, u.top);
      if (target_.smooth > 0) add_smoothing(z.at, at, n);
      const Block<R> block = {z.at, u.at, n, at == 0 ? head_ : 0, find_label(z.at, u.at, at, n)};
      const auto to = e_.from(a_.dlogits ? at : at % kLanes<R>);
      const Ahead ahead = ahead_of(at + n);
      const double z_ref = reference(z_top_), u_ref = reference(u_top_);
      if (u_) {
        kSumTaught<R>[mode_](block, to, z_ref, u_ref, exponents_, ahead, sums_);
      } else {
        sums_.other += sum_fresh(block, z_ref, exponents_, ahead, to.first);
      }
    }
    put_label_in();
  }

  Ahead ahead_of(int64_t at) const {
    const int64_t z_size = sizeof(T), u_size = size_of(a_.last_dtype);
    return {reinterpret_cast<uintptr_t>(z_) + at * z_size,
            reinterpret_cast<uintptr_t>(u_) + at * u_size, z_size, u_size};
  }

  // Takes the tops of a block in; the sums so far then refer to the new ones.
  void raise_tops(int64_t at, double z_top, double u_top) {
    if (at > 0 && !(z_top > z_top_) && !(u_top > u_top_)) return;
    const double z_old = z_top_, u_old = u_top_;
    if (z_top > z_top_) z_top_ = z_top;
    if (u_top > u_top_) u_top_ = u_top;
    s_.runs[runs_++] = {at, z_top_, u_top_};
    if (at == 0) return;
    const double z_shift = reference(z_old) - z_top_, u_shift = reference(u_old) - u_top_;
    const double student = std::isfinite(z_old) ? std::exp(z_shift / temperature_) : 0;
    const double teacher = std::isfinite(u_old) ? std::exp(u_shift / temperature_) : 0;
    sums_.other *= std::isfinite(z_old) ? std::exp(z_shift) : 0;
    sums_.smooth += weight_so_far_ * (reference(z_old) - reference(z_top_));
    if (!u_) return;
    // Where the teacher had no class yet there is no gap, and the shift may be infinite.
    if (std::isfinite(u_old))
      sums_.gap = teacher * (sums_.gap + sums_.teacher * (u_shift - z_shift));
    sums_.student *= student;
    sums_.teacher *= teacher;
  }

  // A class of weight 0 adds nothing, even where its logit is -inf.
  void add_smoothing(const R* z, int64_t at, int64_t n) {
    const R* weight = a_.weight ? static_cast<const R*>(a_.weight) + at : nullptr;
    const R top = R(reference(z_top_));
    double sum = 0, weights = 0;
    for (int64_t c = 0; c < n; ++c) {
      const R w = weight ? weight[c] : 1;
      sum += w == 0 ? 0 : w * (z[c] - top);
      weights += w;
    }
    sums_.smooth += sum;
    weight_so_far_ += weights;
  }

  // The label's place in the block from `at`, or -1.
  int64_t find_label(const R* z, const R* u, int64_t at, int64_t n) {
    const int64_t c = label_ - at;
    if (c < 0 || c >= n) return -1;
    z_y_ = z[c];
    if (u_) u_y_ = u[c];
    return c;
  }

  void put_label_in() {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    sums_.x_y = z_y_ - z_top_;
    sums_.e_y = exp_or_one(sums_.x_y);
    if (label_b_ >= 0) {
      sums_.x_b = z_b_ - z_top_;
      sums_.e_b = exp_or_one(sums_.x_b);
    }
    if (!u_) return;
    const double u_y = u_y_ - u_top_;
    sums_.student_y = exp_or_one(sums_.x_y / temperature_);
    sums_.teacher_y = exp_or_one(u_y / temperature_);
    sums_.student += sums_.student_y;
    sums_.teacher += sums_.teacher_y;
    if (u_y != -infinity)
      sums_.gap += sums_.x_y == -infinity ? infinity : sums_.teacher_y * (u_y - sums_.x_y);
    // Without a NaN in the row this is 0 times infinity: a class that the student rules out and
    // the teacher does not, although its weight underflows.
    if (std::isnan(sums_.gap)) sums_.gap = infinity;
  }

  void write_row(double alpha) {
    const double ce = valid_ ? job_.grad_scale * job_.ce_inverse : 0;
    const double kl = u_ ? job_.grad_scale * job_.kl_inverse * alpha * temperature_ : 0;
    const double hard = ce * (target_.target + target_.rest) / (sums_.other + sums_.e_y);
    T* to = gradient_row();
    const int64_t end = a_.C;
    const double soft = u_ ? kl / sums_.student : 0, teacher = u_ ? kl / sums_.teacher : 0;
    for (int64_t r = 0; r < runs_; ++r) {
      const Run& run = s_.runs[r];
      const int64_t run_end = r + 1 < runs_ ? s_.runs[r + 1].begin : end;
      const double z_shift = run.z_top - z_top_, u_shift = run.u_top - u_top_;
      Coefficients<R> k = {R(hard * exp_or_one(z_shift)), 0, 0, R(ce * target_.smooth)};
      if (u_) {
        k.soft = R(soft * exp_or_one(z_shift / temperature_));
        k.teacher = R(teacher * exp_or_one(u_shift / temperature_));
      }
      if (weighted_smoothing()) weigh(run.begin, run_end, k);
      const int mode = mode_ - kFresh;
      const auto write = job_.stream ? kWriteGradient<T, true> : kWriteGradient<T, false>;
      write[mode](e_, run.begin, run_end, k, label_, to);
    }
    double label = ce * row_label_gradient(sums_, target_);
    if (u_) label += soft * sums_.student_y - teacher * sums_.teacher_y;
    store_one(to + label_, R(label));
    if (label_b_ >= 0) store_one(to + label_b_, R(label_b_gradient(ce, soft, teacher)));
  }

  double label_b_gradient(double ce, double soft, double teacher) const {
    const double hard = ce * row_label_b_gradient(sums_, target_b_);
    if (!u_) return hard;
    const double student_b = exp_or_one(sums_.x_b / temperature_);
    const double teacher_b = exp_or_one((u_b_ - u_top_) / temperature_);
    return hard + soft * student_b - teacher * teacher_b;
  }

  // Puts the weights of the smoothing part into the stored exponentials.
  void weigh(int64_t begin, int64_t end, Coefficients<R>& k) const {
    R* e = u_ ? e_.hard : e_.first;
    const R* w = static_cast<const R*>(a_.weight);
    for (int64_t c = begin; c < end; ++c) e[c] = e[c] * k.hard - w[c] * k.smooth;
    k.hard = 1;
    k.smooth = 0;
  }

  const DlbJob& job_;
  const DlbArgs& a_;
  const Scratch<R> s_;
  const LoadBlock<R> load_teacher_;

  Exponentials<R> e_ = {};
  int64_t head_ = 0;  // classes before the first whole vector
  int64_t row_ = 0;
  bool valid_ = false;                // has a cross-entropy
  int64_t label_ = 0, label_b_ = -1;  // -1: the row has one label
  int64_t cached_ = -1;               // row of the next cache that is still to be written
  const T* z_ = nullptr;
  const char* u_ = nullptr;  // null: not taught
  double temperature_ = 1;
  Exponents<R> exponents_{1};
  double z_top_ = 0, u_top_ = 0, z_y_ = 0, u_y_ = 0, z_b_ = 0, u_b_ = 0;
  double weight_so_far_ = 0;
  int mode_ = 0;
  int64_t runs_ = 0;
  RowTarget<double> target_ = {}, target_b_ = {};
  RowSums<double> sums_ = {};
};

template <class T>
void run_rows(const DlbJob& job, int64_t begin, int64_t end, char* scratch) {
  RowKernel<T> kernel(job, scratch);
  const auto run = [&kernel](int64_t i) { kernel.run(i); };
  char* short_scratch = scratch + dlb_row_scratch_bytes(*job.args);
  if (NarrowRows<T>::takes(job)) {
    NarrowRows<T>(job, short_scratch).run(begin, end, run);
  } else if (ShortRows<T>::takes(job)) {
    ShortRows<T>(job, short_scratch).run(begin, end, run);
  } else {
    for (int64_t i = begin; i < end; ++i) run(i);
  }
  if (job.stream) finish_streams();
}

}  // namespace

void DLB_ROWS(const DlbJob& job, int64_t begin, int64_t end, char* scratch) {
  switch (job.args->dtype) {
    case DLB_FLOAT64:
      return run_rows<double>(job, begin, end, scratch);
    case DLB_BFLOAT16:
      return run_rows<BFloat16>(job, begin, end, scratch);
    case DLB_FLOAT16:
      return run_rows<Float16>(job, begin, end, scratch);
    default:
      return run_rows<float>(job, begin, end, scratch);
  }
}
