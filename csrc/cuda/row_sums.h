// The sums over the classes of one row, and the row's gradient from them: equations (1) to (6) of
// dlb_fused/reference.py, for any number of threads that share a row.
//
// Exponents are in base 2, x = z log2(e) - top with one rounding, top = max z log2(e) rounded, in
// two scales: x for the cross-entropy; xk = x / temperature and uk, the teacher's, for the
// divergence. The rounding of a top shifts all x of a row alike, and no equation changes under a
// common shift as long as all of its terms use x; the two scales meet in no equation. Each thread
// has running maxima of its own; where two meet, both are brought to the larger one.
#pragma once
#include "../row_math.h"
#include "elements.h"

// What a row costs: cross-entropy alone; with a teacher; with a teacher at temperature 3, the
// default, where e^x = (e^(x/3))^3 saves one of three exponentials.
enum class Kind { kPlain, kTaught, kCube };

// No maximum begins below this: its product with log2(e) / temperature is still finite, so that no
// difference of two tops is NaN without cause.
template <class R>
constexpr R kFloor = sizeof(R) == 8 ? R(-1e300) : R(-1e30);

// Without the label's class, whose terms are added at the end: they must not be lost in the sums.
template <class R>
struct Sums {
  R z_max;    // running maximum of the logits, never below kFloor
  R other;    // exp2(x)
  R p_max;    // the same of the teacher
  R student;  // exp2(xk)
  R teacher;  // exp2(uk)
  R gap;      // exp2(uk) (uk - xk)
  R weights;  // w, and w x: only with label smoothing
  R smooth;
  R z_label, p_label;  // logits at the label's class in the thread that met it, 0 in the others
};

template <class R>
DLB_DEVICE Sums<R> no_sums() {
  return {kFloor<R>, 0, kFloor<R>, 0, 0, 0, 0, 0, 0, 0};
}

template <class R>
struct Scales {
  R one, k;   // log2(e), and over the temperature
  bool cube;  // x is 3 xk, as in Kind::kCube: not log2(e) z - top, which is rounded otherwise
};

// The rounded top of a maximum: the same wherever it is computed, or terms would not meet.
template <class R>
DLB_DEVICE R top_of(R maximum, R scale) {
  return product(maximum, scale);
}

// By how much x falls when the maximum rises.
template <class R>
DLB_DEVICE R x_drop(R from, R to, Scales<R> scale) {
  return scale.cube ? 3 * (top_of(from, scale.k) - top_of(to, scale.k))
                    : top_of(from, scale.one) - top_of(to, scale.one);
}

template <class R>
DLB_DEVICE R x_of(R z, R maximum, Scales<R> scale) {
  return scale.cube ? 3 * fused(z, scale.k, -top_of(maximum, scale.k))
                    : fused(z, scale.one, -top_of(maximum, scale.one));
}

template <class R>
DLB_DEVICE Scales<R> scales_of(R temperature, bool cube) {
  return {kLog2e<R>, kLog2e<R> / temperature, cube};
}

// uk - xk of equation (3), so that q times it is 0 for a class that the teacher excludes (q = 0),
// and not finite for one that only the student excludes: `row_divergence` makes +inf of that.
template <class R>
DLB_DEVICE R gap_of(R uk, R xk) {
  return larger(uk - xk, kFloor<R>);
}

template <class R, int kN>
DLB_DEVICE R largest(R x, const R (&of)[kN]) {
#pragma unroll
  for (int j = 0; j < kN; ++j) x = larger(x, of[j]);
  return x;
}

// s in other maxima, which are not below its own.
template <Kind kKind, bool kSmooth, class R>
DLB_DEVICE void rebase(Sums<R>& s, R z_max, R p_max, Scales<R> scale) {
  const R drop = x_drop(s.z_max, z_max, scale);
  if constexpr (kSmooth) s.smooth = fused(s.weights, drop, s.smooth);
  s.other *= exp2_of(drop);
  if constexpr (kKind != Kind::kPlain) {
    const R z_drop = top_of(s.z_max, scale.k) - top_of(z_max, scale.k);
    const R p_drop = top_of(s.p_max, scale.k) - top_of(p_max, scale.k), keep = exp2_of(p_drop);
    s.student *= exp2_of(z_drop);
    s.gap = keep * fused(s.teacher, p_drop - z_drop, s.gap);
    s.teacher *= keep;
    s.p_max = p_max;
  }
  s.z_max = z_max;
}

// Some more classes, of which none is above the maxima. w: their weights in the smoothed target.
template <Kind kKind, bool kSmooth, class R, int kN>
DLB_DEVICE void add_below(Sums<R>& s, const R (&z)[kN], const R (&p)[kN], const R (&w)[kN],
                          Scales<R> scale) {
  const R top = top_of(s.z_max, scale.one), z_top = top_of(s.z_max, scale.k),
          p_top = top_of(s.p_max, scale.k);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    if constexpr (kKind != Kind::kPlain) {
      const R xk = fused(z[j], scale.k, -z_top), uk = fused(p[j], scale.k, -p_top);
      const R student = exp2_of(xk), q = exp2_of(uk);
      s.student += student;
      s.teacher += q;
      s.gap = fused(q, gap_of(uk, xk), s.gap);
      if constexpr (kKind == Kind::kCube) s.other += student * student * student;
    }
    const R x = fused(z[j], scale.one, -top);
    if constexpr (kKind != Kind::kCube) s.other += exp2_of(x);
    if constexpr (kSmooth) {
      s.weights += w[j];
      s.smooth += w[j] == 0 ? 0 : w[j] * x;
    }
  }
}

// Some more classes.
template <Kind kKind, bool kSmooth, class R, int kN>
DLB_DEVICE void add(Sums<R>& s, const R (&z)[kN], const R (&p)[kN], const R (&w)[kN],
                    Scales<R> scale) {
  rebase<kKind, kSmooth>(s, largest(s.z_max, z), kKind == Kind::kPlain ? R(0) : largest(s.p_max, p),
                         scale);
  add_below<kKind, kSmooth>(s, z, p, w, scale);
}

// a and b together.
template <Kind kKind, bool kSmooth, class R>
DLB_DEVICE Sums<R> merged(Sums<R> a, Sums<R> b, Scales<R> scale) {
  const R z_max = larger(a.z_max, b.z_max), p_max = larger(a.p_max, b.p_max);
  rebase<kKind, kSmooth>(a, z_max, p_max, scale);
  rebase<kKind, kSmooth>(b, z_max, p_max, scale);
  return {z_max,
          a.other + b.other,
          p_max,
          a.student + b.student,
          a.teacher + b.teacher,
          a.gap + b.gap,
          a.weights + b.weights,
          a.smooth + b.smooth,
          a.z_label + b.z_label,
          a.p_label + b.p_label};
}

// Of the lanes of a warp whose numbers differ in the bits of lanes - 1; all 32 must come. Their
// maxima meet first, so that sums are brought to another one only once.
template <Kind kKind, bool kSmooth, class R>
DLB_DEVICE Sums<R> merged_lanes(Sums<R> s, Scales<R> scale, unsigned lanes) {
  R z_max = s.z_max, p_max = s.p_max;
  for (unsigned mask = 1; mask < lanes; mask *= 2) {
    z_max = larger(z_max, __shfl_xor_sync(~0u, z_max, mask));
    if constexpr (kKind != Kind::kPlain) p_max = larger(p_max, __shfl_xor_sync(~0u, p_max, mask));
  }
  rebase<kKind, kSmooth>(s, z_max, p_max, scale);
  for (unsigned mask = 1; mask < lanes; mask *= 2) {
    s.other += __shfl_xor_sync(~0u, s.other, mask);
    s.z_label += __shfl_xor_sync(~0u, s.z_label, mask);
    if constexpr (kKind != Kind::kPlain) {
      s.student += __shfl_xor_sync(~0u, s.student, mask);
      s.teacher += __shfl_xor_sync(~0u, s.teacher, mask);
      s.gap += __shfl_xor_sync(~0u, s.gap, mask);
      s.p_label += __shfl_xor_sync(~0u, s.p_label, mask);
    }
    if constexpr (kSmooth) {
      s.weights += __shfl_xor_sync(~0u, s.weights, mask);
      s.smooth += __shfl_xor_sync(~0u, s.smooth, mask);
    }
  }
  return s;
}

// What the gradient of a row needs: g = e factor - w less + s from_student - q from_teacher.
template <class R>
struct Gradient {
  R z_max, p_max;
  R factor, less, from_student, from_teacher;
  R at_label, at_label_b;  // at_label_b: of the cross-entropy alone
};

// The divergence's part at a class with these logits.
template <class R>
DLB_DEVICE R divergence_gradient(const Gradient<R>& g, Scales<R> scale, R z, R p) {
  const R student = exp2_of(fused(z, scale.k, -top_of(g.z_max, scale.k)));
  const R q = exp2_of(fused(p, scale.k, -top_of(g.p_max, scale.k)));
  return fused(student, g.from_student, -(q * g.from_teacher));
}

template <Kind kKind, bool kSmooth, class R, int kN>
DLB_DEVICE void gradient(const Gradient<R>& g, const R (&z)[kN], const R (&p)[kN], const R (&w)[kN],
                         Scales<R> scale, R (&out)[kN]) {
  const R top = top_of(g.z_max, scale.one), z_top = top_of(g.z_max, scale.k),
          p_top = top_of(g.p_max, scale.k);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    if constexpr (kKind == Kind::kPlain) {
      out[j] = exp2_of(fused(z[j], scale.one, -top)) * g.factor;
    } else {
      const R student = exp2_of(fused(z[j], scale.k, -z_top));
      const R q = exp2_of(fused(p[j], scale.k, -p_top));
      R e;
      if constexpr (kKind == Kind::kCube) {
        e = student * student * student;
      } else {
        e = exp2_of(fused(z[j], scale.one, -top));
      }
      out[j] = fused(e, g.factor, fused(student, g.from_student, -(q * g.from_teacher)));
    }
    if constexpr (kSmooth) out[j] = fused(-w[j], g.less, out[j]);
  }
}

// The less likely one of a row's two labels.
template <class R>
struct LabelB {
  int label;  // -1: the row has one label
  R share;    // in the target; the likelier one has the rest
  R weight;
  R z;  // its logit
};

template <class R>
DLB_DEVICE LabelB<R> no_label_b() {
  return {-1, 0, 1, 0};
}

// What of the batch concerns one row.
template <class R>
struct RowFacts {
  int label;        // of two labels the likelier one; -1: none of the classes, or no such row
  bool valid;       // no label of it is ignore_index
  bool taught;      // the guard allowing
  int64_t teacher;  // its teacher's row
  R temperature, alpha;
  R label_weight;  // NaN for a valid label out of range
};

template <class R>
struct RowLoss {
  R ce, kl, distil;  // equations (2) and (3), and the part of (4)
  bool fit;          // may teach
};

// Equation (3), in base 2 until here.
template <class R>
DLB_DEVICE R row_divergence(const RowSums<R>& s, R temperature) {
  const R kl = row_kl(s, temperature);
  const bool finite = s.gap - s.gap == 0;
  return finite || !(s.student > 0) || !(s.teacher > 0) ? kl : infinity<R>();
}

// The label's class, as sums of its own; but not in `other`, which is without it.
template <Kind kKind, bool kSmooth, class R>
DLB_DEVICE Sums<R> label_sums(const Sums<R>& s, R weight, Scales<R> scale) {
  Sums<R> y = no_sums<R>();
  y.z_max = larger(y.z_max, s.z_label);
  if constexpr (kKind != Kind::kPlain) {
    y.p_max = larger(y.p_max, s.p_label);
    const R xk = fused(s.z_label, scale.k, -top_of(y.z_max, scale.k));
    const R uk = fused(s.p_label, scale.k, -top_of(y.p_max, scale.k));
    y.student = exp2_of(xk);
    y.teacher = exp2_of(uk);
    y.gap = y.teacher * gap_of(uk, xk);
  }
  if constexpr (kSmooth) {
    y.weights = weight;
    y.smooth = weight == 0 ? 0 : weight * x_of(s.z_label, y.z_max, scale);
  }
  return y;
}

// The end of a row from its sums; not taught, it may have a teacher all the same, which then has no
// part in it. ce_share, kl_share: the gradient's scale over the counts.
template <Kind kKind, bool kSmooth, class R>
DLB_DEVICE RowLoss<R> row_end(Sums<R> s, const RowFacts<R>& row, const LabelB<R>& b,
                              Scales<R> scale, int64_t classes, R smoothing, R ce_share, R kl_share,
                              Gradient<R>& g) {
  const bool known = row.label >= 0;
  const R z_label = s.z_label, p_label = s.p_label;
  if (known) {
    const Sums<R> y = label_sums<kKind, kSmooth>(s, row.label_weight, scale);
    s = merged<kKind, kSmooth>(s, y, scale);
  }
  RowSums<R> r{};
  const R x = x_of(z_label, s.z_max, scale);
  r.other = s.other;
  r.e_y = known ? exp2_of(x) : 0;
  r.x_y = known ? kLn2<R> * x : 0;
  const bool two = b.label >= 0;
  if (two) {
    const R x_b = x_of(b.z, s.z_max, scale);
    r.e_b = exp2_of(x_b);
    r.x_b = kLn2<R> * x_b;
  }
  // No other class has any weight: then not even the rounding of the top shall be seen.
  if (r.other == 0 && r.e_y > 0) r.x_b -= r.x_y, r.e_y = 1, r.x_y = 0;
  r.smooth = smoothing == 0 ? 0 : kLn2<R> * s.smooth;
  const Label<R> own{1 - b.share, row.label_weight}, other{b.share, b.weight};
  const RowTarget<R> t = row_target(smoothing, R(classes), own, other, s.weights);
  const R total = r.other + r.e_y;
  g.z_max = s.z_max, g.p_max = row.taught ? s.p_max : s.z_max;
  g.factor = ce_share * (t.hard + t.hard_b + t.smooth * s.weights) / total;
  g.less = ce_share * t.smooth;
  g.at_label = ce_share * row_label_gradient(r, t);
  g.at_label_b = 0;
  if (two) {
    const RowTarget<R> t_b = row_target(smoothing, R(classes), other, own, s.weights);
    g.at_label_b = ce_share * row_label_b_gradient(r, t_b);
  }
  g.from_student = g.from_teacher = 0;
  RowLoss<R> loss{row.valid ? row_ce(r, t, s.weights) : R(0), 0, 0, total > 0};
  if (kKind == Kind::kPlain || !row.taught) return loss;

  r.student = s.student;
  r.teacher = s.teacher;
  r.gap = kLn2<R> * row.temperature * s.gap;
  const R share = row.alpha * row.temperature * kl_share;
  g.from_student = share / s.student;
  g.from_teacher = share / s.teacher;
  if (known) {
    const R student = exp2_of(fused(z_label, scale.k, -top_of(s.z_max, scale.k)));
    const R q = exp2_of(fused(p_label, scale.k, -top_of(s.p_max, scale.k)));
    g.at_label += share * (student / s.student - q / s.teacher);  // 1 - 1 where C = 1
  }
  loss.kl = row_divergence(r, row.temperature);
  if (row.alpha != 0) loss.distil = row.alpha * row.temperature * row.temperature * loss.kl;
  return loss;
}
