/* Jansen-Rit under exponential Euler by hand, and its gradient: the baseline of benchmarks/native.py.
 *
 * Written as one would for speed: lanes in blocks that stay in the first cache, coefficients formed before the loop, the
 * sigmoid from a polynomial exp that the compiler turns into SIMD, a thread for each share of the blocks.
 * The gradient keeps a checkpoint each `segment` steps, replays a segment into cache and walks back; it is of mean(eeg^2)
 * in Ae, be and C of each mass; with SLOPES_IN_C_ALONE only the last is right, and the others cost nothing.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define B 64
#define DT 1e-4f
#define EACH for (int i = 0; i < B; i++)

typedef struct {
  const float *Ae, *be, *C;
  float *eeg, *dAe, *dbe, *dC;
  int lanes, steps, every, segment, first, last, gradient;
} Job;

static inline float exponential(float x) {
  x = fminf(fmaxf(x, -87.0f), 88.0f);
  float n = rintf(x * 1.4426950408889634f), r = x - n * 0.6931471805599453f;
  float p = 0.5f + r * (0.16666512f + r * (0.04166619f + r * (0.0083696f + r * 0.00139517f)));
  union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
  return power.f * (1.0f + r * (1.0f + r * p));
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

typedef struct { float M[B], E[B], I[B], Mv[B], Ev[B], Iv[B]; } State;
/* v' = keep v + push rate(..) - pull x, and what the potentials are made of */
typedef struct { float keep[B], pull[B], pushM[B], pushE[B], inE[B], C[B], pushI[B]; } Coefs;

static const float keep_i = 0.9900498f, pull_i = 0.2487531f; /* exp(-0.01), (1 - exp(-0.01)) / 100 * 2500 */

static void coefficients(Coefs *c, const Job *job, int lane) {
  EACH {
    float Ae = job->Ae[lane + i], be = job->be[lane + i], C = job->C[lane + i];
    float g = -expm1f(-2 * be * DT) / (2 * be), gi = -expm1f(-2 * 50.0f * DT) / 100.0f;
    c->keep[i] = 1 - 2 * be * g;
    c->pull[i] = g * be * be;
    c->pushM[i] = g * Ae * be * 5;
    c->inE[i] = g * Ae * be * 220;
    c->pushE[i] = g * Ae * be * 0.8f * C * 5;
    c->C[i] = C;
    c->pushI[i] = gi * 22 * 50 * 0.25f * C * 5;
  }
}

static inline void step(State *s, const Coefs *c) {
  EACH {
    float M = s->M[i], E = s->E[i], I = s->I[i], C = c->C[i];
    float sM = sigmoid(0.56f * (E - I - 6)), sE = sigmoid(0.56f * (C * M - 6)), sI = sigmoid(0.56f * (0.25f * C * M - 6));
    s->M[i] = M + DT * s->Mv[i];
    s->E[i] = E + DT * s->Ev[i];
    s->I[i] = I + DT * s->Iv[i];
    s->Mv[i] = c->keep[i] * s->Mv[i] + c->pushM[i] * sM - c->pull[i] * M;
    s->Ev[i] = c->keep[i] * s->Ev[i] + c->inE[i] + c->pushE[i] * sE - c->pull[i] * E;
    s->Iv[i] = keep_i * s->Iv[i] + c->pushI[i] * sI - pull_i * I;
  }
}

static void forward(const Job *job, int lane, State *checkpoints) {
  State s;
  Coefs c;
  memset(&s, 0, sizeof s);
  coefficients(&c, job, lane);
  for (int n = 0; n < job->steps; n++) {
    if (checkpoints && n % job->segment == 0) checkpoints[n / job->segment] = s;
    step(&s, &c);
    if ((n + 1) % job->every == 0) {
      float *out = job->eeg + (size_t)(n / job->every) * job->lanes + lane;
      EACH out[i] = s.E[i] - s.I[i];
    }
  }
}

/* What the way back needs of a step: the state, and the three sigmoids. */
typedef struct { State s; float sM[B], sE[B], sI[B]; } Kept;

static inline void replayed(State *s, const Coefs *c, Kept *k) {
  EACH {
    float M = s->M[i], E = s->E[i], I = s->I[i], C = c->C[i], Mv = s->Mv[i], Ev = s->Ev[i], Iv = s->Iv[i];
    float sM = sigmoid(0.56f * (E - I - 6)), sE = sigmoid(0.56f * (C * M - 6)), sI = sigmoid(0.56f * (0.25f * C * M - 6));
    k->s.M[i] = M; k->s.E[i] = E; k->s.Mv[i] = Mv; k->s.Ev[i] = Ev;
    k->sM[i] = sM; k->sE[i] = sE; k->sI[i] = sI;
    s->M[i] = M + DT * Mv;
    s->E[i] = E + DT * Ev;
    s->I[i] = I + DT * Iv;
    s->Mv[i] = c->keep[i] * Mv + c->pushM[i] * sM - c->pull[i] * M;
    s->Ev[i] = c->keep[i] * Ev + c->inE[i] + c->pushE[i] * sE - c->pull[i] * E;
    s->Iv[i] = keep_i * Iv + c->pushI[i] * sI - pull_i * I;
  }
}

static inline void back(State *a, Coefs *d, const Coefs *c, const Kept *k) {
  EACH {
    float M = k->s.M[i], aM = a->M[i], aE = a->E[i], aI = a->I[i], aMv = a->Mv[i], aEv = a->Ev[i], aIv = a->Iv[i];
    float sM = k->sM[i], sE = k->sE[i], sI = k->sI[i];
    float pM = 0.56f * aMv * c->pushM[i] * sM * (1 - sM);
    float pE = 0.56f * aEv * c->pushE[i] * sE * (1 - sE);
    float pI = 0.14f * aIv * c->pushI[i] * sI * (1 - sI);
#ifndef SLOPES_IN_C_ALONE
    d->keep[i] += aMv * k->s.Mv[i] + aEv * k->s.Ev[i];
    d->pull[i] -= aMv * M + aEv * k->s.E[i];
    d->pushM[i] += aMv * sM;
    d->inE[i] += aEv;
#endif
    d->pushE[i] += aEv * sE;
    d->pushI[i] += aIv * sI;
    d->C[i] += (pE + pI) * M;
    a->M[i] = aM + (pE + pI) * c->C[i] - c->pull[i] * aMv;
    a->E[i] = aE + pM - c->pull[i] * aEv;
    a->I[i] = aI - pM - pull_i * aIv;
    a->Mv[i] = DT * aM + c->keep[i] * aMv;
    a->Ev[i] = DT * aE + c->keep[i] * aEv;
    a->Iv[i] = DT * aI + keep_i * aIv;
  }
}

static void gradient(const Job *job, int lane) {
  int segments = (job->steps + job->segment - 1) / job->segment;
  State *checkpoints = malloc(segments * sizeof(State));
  Kept *kept = malloc(job->segment * sizeof(Kept));
  forward(job, lane, checkpoints);
  Coefs c, d;
  State a, s;
  coefficients(&c, job, lane);
  memset(&d, 0, sizeof d);
  memset(&a, 0, sizeof a);
  float scale = 2.0f / ((float)job->lanes * (job->steps / job->every));
  for (int g = segments - 1; g >= 0; g--) {
    int start = g * job->segment, length = job->steps - start < job->segment ? job->steps - start : job->segment;
    s = checkpoints[g];
    for (int j = 0; j < length; j++) replayed(&s, &c, &kept[j]);
    for (int j = length - 1; j >= 0; j--) {
      int n = start + j;
      if ((n + 1) % job->every == 0) {
        const float *out = job->eeg + (size_t)(n / job->every) * job->lanes + lane;
        EACH { a.E[i] += scale * out[i]; a.I[i] -= scale * out[i]; }
      }
      back(&a, &d, &c, &kept[j]);
    }
  }
  EACH {
    float Ae = c.pushM[i], be = job->be[lane + i], C = c.C[i];
    float e = expf(-2 * be * DT), g = (1 - e) / (2 * be), dg = (DT * e - g) / be; /* g and its slope in be */
    Ae = job->Ae[lane + i];
    float gi = -expm1f(-2 * 50.0f * DT) / 100.0f;
    float drive = 5 * d.pushM[i] + 220 * d.inE[i] + 4 * C * d.pushE[i];
    job->dAe[lane + i] = g * be * drive;
    job->dbe[lane + i] = (g + be * dg) * Ae * drive - 2 * (g + be * dg) * d.keep[i] + (2 * be * g + be * be * dg) * d.pull[i];
    job->dC[lane + i] = d.C[i] + 4 * g * Ae * be * d.pushE[i] + gi * 22 * 50 * 1.25f * d.pushI[i];
  }
  free(checkpoints);
  free(kept);
}

static void *work(void *argument) {
  const Job *job = argument;
  for (int lane = job->first; lane < job->last; lane += B) {
    if (job->gradient) gradient(job, lane);
    else forward(job, lane, NULL);
  }
  return NULL;
}

/* lanes must be a multiple of 64 times the number of threads */
void run(const float *Ae, const float *be, const float *C, float *eeg, float *dAe, float *dbe, float *dC, int lanes,
         int steps, int every, int segment, int with_gradient, int threads) {
  pthread_t others[64];
  Job jobs[64];
  for (int t = 0; t < threads; t++) {
    int each = lanes / threads;
    jobs[t] = (Job){Ae, be, C, eeg, dAe, dbe, dC, lanes, steps, every, segment, t * each, (t + 1) * each, with_gradient};
    if (t) pthread_create(&others[t], NULL, work, &jobs[t]);
  }
  work(&jobs[0]);
  for (int t = 1; t < threads; t++) pthread_join(others[t], NULL);
}
