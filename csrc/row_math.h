// The scalars of one row, from its sums: equations (1) to (6) of dlb_fused/reference.py.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define DLB_ROW_MATH __host__ __device__ static inline
#else
#define DLB_ROW_MATH static inline
#endif

// Sums over the classes of one row, with x = z - max z and u = z' - max z'. One class has no part
// in `other`: the label's, or of two labels that of the likelier one, so that the exp(x) of the
// other one, b, can be taken off again without the loss of more than one bit.
template <class R>
struct RowSums {
  R other;      // exp(x) without the label's class
  R e_y;        // exp(x) of the label's class
  R x_y;        // x of the label's class
  R e_b, x_b;   // the same of b; 0 if there is none
  R smooth;     // w x, only with label smoothing
  R student;    // exp(x / temperature)
  R student_y;  // the label's part of `student`
  R teacher;    // exp(u / temperature)
  R teacher_y;  // the label's part of `teacher`
  R gap;        // exp(u / temperature) (u - x)
};

// A label of a row: its part of the row's target, and the weight of its class.
template <class R>
struct Label {
  R share, weight;
};

// t_c of (2) is `target` at the label, smooth * w_c + hard_b at b, and smooth * w_c elsewhere.
template <class R>
struct RowTarget {
  R hard, hard_b;  // (1 - eps) share weight
  R smooth;        // eps / C
  R target;        // t_y
  R rest;          // A - t_y: exactly 0 with one label and without smoothing
};

template <class R>
DLB_ROW_MATH RowTarget<R> row_target(R eps, R classes, Label<R> y, Label<R> b, R weight_sum) {
  RowTarget<R> t;
  t.hard = (1 - eps) * y.share * y.weight;
  t.hard_b = (1 - eps) * b.share * b.weight;
  t.smooth = eps / classes;
  t.target = t.hard + t.smooth * y.weight;
  t.rest = t.hard_b + t.smooth * (weight_sum - y.weight);
  return t;
}

// A label without a part in the target has none, even where its x is -inf.
template <class R>
DLB_ROW_MATH R row_label_term(R hard, R x) {
  return hard == 0 ? 0 : hard * x;
}

template <class R>
DLB_ROW_MATH R row_ce(const RowSums<R>& s, const RowTarget<R>& t, R weight_sum) {
  const R log_sum = std::log(s.other + s.e_y);
  const R labels = row_label_term(t.hard, s.x_y) + row_label_term(t.hard_b, s.x_b);
  return (t.hard + t.hard_b + t.smooth * weight_sum) * log_sum - labels - t.smooth * s.smooth;
}

template <class R>
DLB_ROW_MATH R row_kl(const RowSums<R>& s, R temperature) {
  return s.gap / (s.teacher * temperature) + std::log(s.student / s.teacher);
}

// CE gradient at the label. Not p_y - 1, which has no digits left for a confident row.
template <class R>
DLB_ROW_MATH R row_label_gradient(const RowSums<R>& s, const RowTarget<R>& t) {
  return (t.rest * s.e_y - t.target * s.other) / (s.other + s.e_y);
}

// The same at b. `t` is the target as seen from there: row_target with the labels exchanged.
template <class R>
DLB_ROW_MATH R row_label_b_gradient(const RowSums<R>& s, const RowTarget<R>& t) {
  return (t.rest * s.e_b - t.target * (s.other - s.e_b + s.e_y)) / (s.other + s.e_y);
}

template <class R>
DLB_ROW_MATH R inverse_count(R count) {
  return count <= 0 ? 0 : 1 / count;  // NaN stays NaN
}
