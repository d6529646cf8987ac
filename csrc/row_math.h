// The scalars of one row, from its sums: equations (1) to (6) of dlb_fused/reference.py.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define DLB_ROW_MATH __host__ __device__ static inline
#else
#define DLB_ROW_MATH static inline
#endif

// Sums over the classes of one row, with x = z - max z and u = z' - max z'.
template <class R>
struct RowSums {
  R other;      // exp(x) without the label's class
  R e_y;        // exp(x) of the label's class
  R x_y;        // x of the label's class
  R smooth;     // w x, only with label smoothing
  R student;    // exp(x / temperature)
  R student_y;  // the label's part of `student`
  R teacher;    // exp(u / temperature)
  R teacher_y;  // the label's part of `teacher`
  R gap;        // exp(u / temperature) (u - x)
};

// t_c of (2) is `target` at the label and smooth * w_c elsewhere.
template <class R>
struct RowTarget {
  R hard;    // (1 - eps) w_y
  R smooth;  // eps / C
  R target;  // t_y
  R rest;    // A - t_y: exactly 0 without smoothing
};

template <class R>
DLB_ROW_MATH RowTarget<R> row_target(R eps, R classes, R label_weight, R weight_sum) {
  RowTarget<R> t;
  t.hard = (1 - eps) * label_weight;
  t.smooth = eps / classes;
  t.target = t.hard + t.smooth * label_weight;
  t.rest = t.smooth * (weight_sum - label_weight);
  return t;
}

template <class R>
DLB_ROW_MATH R row_ce(const RowSums<R>& s, const RowTarget<R>& t, R weight_sum) {
  const R log_sum = std::log(s.other + s.e_y);
  const R label = t.hard == 0 ? 0 : t.hard * s.x_y;  // x_y may be -inf
  return (t.hard + t.smooth * weight_sum) * log_sum - label - t.smooth * s.smooth;
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

template <class R>
DLB_ROW_MATH R inverse_count(R count) {
  return count <= 0 ? 0 : 1 / count;  // NaN stays NaN
}
