// Shared by the instruction sets without a 32-entry table lookup.
#pragma once

// 2^x by 2^n p(f), n = round(x), |f| <= 1/2, degree 5, minimax relative error 9.1e-8 (reweighted least squares).
// x below -126 is taken as -126: such weights vanish next to the maximum's 1.
#define FV_EXP2_POLY(x)                                                                        \
  const Vec magic = set1(12582912.f); /* 1.5 * 2^23: adding it rounds to an integer */         \
  Vec y = vmax(set1(-126.f), (x));    /* second operand wins for NaN */                        \
  Vec t = add(y, magic);                                                                       \
  Vec f = sub(y, sub(t, magic));                                                               \
  Vec p = set1(FV_E5);                                                                         \
  p = fma(p, f, set1(FV_E4));                                                                  \
  p = fma(p, f, set1(FV_E3));                                                                  \
  p = fma(p, f, set1(FV_E2));                                                                  \
  p = fma(p, f, set1(FV_E1));                                                                  \
  p = fma(p, f, set1(1.f))

#define FV_E1 0.693147f
#define FV_E2 0.24022242f
#define FV_E3 0.055507336f
#define FV_E4 0.009671513f
#define FV_E5 0.0013264727f
