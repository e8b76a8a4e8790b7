// The inner loops of the mutual loss (simd_body.hpp includes this): no include guard, no headers.
//
// Element i of a row belongs to lane i mod DOT_LANES, as in a dot product, and no product is fused
// with a sum: so the bits are the same at every level.

#if defined(__GNUC__)
#define DML_FAST_INLINE __attribute__((always_inline))
#else
#define DML_FAST_INLINE
#endif

constexpr int LOSS_PARTS = DOT_LANES / Floats::WIDTH;  // vectors in a block of DOT_LANES elements
constexpr std::int64_t LOSS_STRIP = 4096;  // elements that are summed in float32

struct LossLanes {
    Floats::Vector part[LOSS_PARTS];
    LossLanes() {
        for (int i = 0; i < LOSS_PARTS; ++i) part[i] = Floats::same(0.0f);
    }
    void add(int i, Floats::Vector x) { part[i] = Floats::plus(part[i], x); }
    double sum() const {
        using D = Doubles;
        float floats[DOT_LANES];
        for (int i = 0; i < LOSS_PARTS; ++i) Floats::store(floats + i * Floats::WIDTH, part[i]);
        D::Vector wide[DOT_LANES / D::WIDTH];
        for (int i = 0; i < DOT_LANES / D::WIDTH; ++i) wide[i] = D::widen(floats + i * D::WIDTH);
        for (int half = DOT_LANES / D::WIDTH / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) wide[i] = D::plus(wide[i], wide[i + half]);
        }
        double lanes[D::WIDTH];
        D::store(lanes, wide[0]);
        for (int half = D::WIDTH / 2; half > 0; half /= 2) {
            for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        }
        return lanes[0];
    }
};

// exp(a) for a <= 0, and exp(a) - 1 without cancellation; 0 and -1 below the normal numbers.
// exp(a) = 2^n (1 + q) with n = round(a / ln 2), |r| <= ln(2) / 2 and q = exp(r) - 1, by the
// polynomial of Cephes' expf (Moshier), which is within 1 ulp.
struct Exponential {
    Floats::Vector whole, less_one;
    explicit Exponential(Floats::Vector a) {
        using F = Floats;
        const F::Vector lowest = F::same(-87.0f);
        const F::Vector x = F::larger(a, lowest);
        const F::Vector magic = F::same(12582912.0f);  // 1.5 * 2^23: adding it rounds to integers
        const F::Vector shifted = F::plus(F::times(x, F::same(1.44269504088896341f)), magic);
        const F::Vector n = F::minus(shifted, magic);
        F::Vector r = F::minus(x, F::times(n, F::same(0.693359375f)));
        r = F::minus(r, F::times(n, F::same(-2.12194440e-4f)));
        F::Vector p = F::same(1.9875691500e-4f);
        p = F::plus(F::times(p, r), F::same(1.3981999507e-3f));
        p = F::plus(F::times(p, r), F::same(8.3334519073e-3f));
        p = F::plus(F::times(p, r), F::same(4.1665795894e-2f));
        p = F::plus(F::times(p, r), F::same(1.6666665459e-1f));
        p = F::plus(F::times(p, r), F::same(5.0000001201e-1f));
        const F::Vector q = F::plus(F::times(p, F::times(r, r)), r);
        const F::Vector scale = F::power_of_two(shifted);
        const F::Vector part = F::times(scale, q);
        whole = F::zero_below(F::plus(scale, part), a, lowest);
        less_one = F::plus(F::minus(scale, F::same(1.0f)), part);
    }
};

// The rest of a row, filled up to a block.
inline void copy_filled(const float* from, std::int64_t n, Floats::Vector filling, float* block) {
    for (int i = 0; i < LOSS_PARTS; ++i) Floats::store(block + i * Floats::WIDTH, filling);
    std::memcpy(block, from, static_cast<std::size_t>(n) * sizeof(float));
}

float largest_of(const float* z, std::int64_t n) {
    float most = -std::numeric_limits<float>::infinity();
    std::int64_t j = 0;
    if (n >= DOT_LANES) {
        Floats::Vector best[LOSS_PARTS];
        for (int i = 0; i < LOSS_PARTS; ++i) best[i] = Floats::load(z + i * Floats::WIDTH);
        for (j = DOT_LANES; j + DOT_LANES <= n; j += DOT_LANES) {
            for (int i = 0; i < LOSS_PARTS; ++i) {
                best[i] = Floats::larger(best[i], Floats::load(z + j + i * Floats::WIDTH));
            }
        }
        float floats[DOT_LANES];
        for (int i = 0; i < LOSS_PARTS; ++i) Floats::store(floats + i * Floats::WIDTH, best[i]);
        for (float x : floats) most = x > most ? x : most;
    }
    for (; j < n; ++j) most = z[j] > most ? z[j] : most;
    return most;
}

void soften(const float* z, std::int64_t n, float largest, float per_temperature, float* w,
            SoftSums& sums) {
    using F = Floats;
    const F::Vector top = F::same(largest), factor = F::same(per_temperature);
    sums = {0.0, 0.0, 0.0, 0.0};
    for (std::int64_t begin = 0; begin < n; begin += LOSS_STRIP) {
        const std::int64_t end = begin + LOSS_STRIP < n ? begin + LOSS_STRIP : n;
        LossLanes whole, less_one, a_lanes, products;
        const auto block = [&](const float* from, float* to) DML_FAST_INLINE {
            for (int i = 0; i < LOSS_PARTS; ++i) {
                const int at = i * F::WIDTH;
                const F::Vector a = F::times(F::minus(F::load(from + at), top), factor);
                const Exponential e(a);
                F::store(to + at, e.whole);
                whole.add(i, e.whole);
                less_one.add(i, e.less_one);
                a_lanes.add(i, a);
                products.add(i, F::times(e.whole, a));
            }
        };
        std::int64_t j = begin;
        for (; j + DOT_LANES <= end; j += DOT_LANES) block(z + j, w + j);
        const std::int64_t rest = end - j;
        if (rest > 0) {  // filled up with the largest: exp(0) = 1, which the count takes off again
            float from[DOT_LANES], to[DOT_LANES];
            copy_filled(z + j, rest, top, from);
            block(from, to);
            std::memcpy(w + j, to, static_cast<std::size_t>(rest) * sizeof(float));
            sums.whole -= static_cast<double>(DOT_LANES - rest);
        }
        sums.whole += whole.sum();
        sums.less_one += less_one.sum();
        sums.a += a_lanes.sum();
        sums.products += products.sum();
    }
}

void mix_peers(const float* const* w, const float* factor, std::int64_t count, std::int64_t n,
               float* v) {
    using F = Floats;
    std::int64_t j = 0;
    for (; j + F::WIDTH <= n; j += F::WIDTH) {
        F::Vector sum = F::times(F::load(w[0] + j), F::same(factor[0]));
        for (std::int64_t l = 1; l < count; ++l) {
            sum = F::plus(sum, F::times(F::load(w[l] + j), F::same(factor[l])));
        }
        F::store(v + j, sum);
    }
    for (; j < n; ++j) {
        float sum = w[0][j] * factor[0];
        for (std::int64_t l = 1; l < count; ++l) sum = sum + w[l][j] * factor[l];
        v[j] = sum;
    }
}

template <bool HOT, bool DENSE, bool GRAD>
void learn_strip(const Learner& k, std::int64_t n, LearnSums& sums) {
    using F = Floats;
    const F::Vector top = F::same(k.largest), factor = F::same(k.per_temperature);
    const F::Vector by_q = F::same(k.by_q), by_p = F::same(k.by_p), by_v = F::same(k.by_v);
    const F::Vector by_t = F::same(k.by_t);
    LossLanes mixed, labelled;
    const auto block = [&](const float* z, const float* v, const float* q, const float* p,
                           const float* t, float* grad) DML_FAST_INLINE {
        for (int i = 0; i < LOSS_PARTS; ++i) {
            const int at = i * F::WIDTH;
            const F::Vector below = F::minus(F::load(z + at), top), peers = F::load(v + at);
            mixed.add(i, F::times(peers, F::times(below, factor)));
            F::Vector target = top;
            if (DENSE) {
                target = F::load(t + at);
                labelled.add(i, F::times(target, below));
            }
            if (!GRAD) continue;
            F::Vector g = F::minus(F::times(F::load(q + at), by_q), F::times(peers, by_v));
            if (HOT) g = F::plus(g, F::times(F::load(p + at), by_p));
            if (DENSE) g = F::minus(g, F::times(target, by_t));
            F::store(grad + at, g);
        }
    };
    std::int64_t j = 0;
    for (; j + DOT_LANES <= n; j += DOT_LANES) {
        block(k.z + j, k.v + j, k.q + j, HOT ? k.p + j : nullptr, DENSE ? k.t + j : nullptr,
              GRAD ? k.grad + j : nullptr);
    }
    const std::int64_t rest = n - j;
    if (rest > 0) {
        float z[DOT_LANES], v[DOT_LANES], q[DOT_LANES], p[DOT_LANES], t[DOT_LANES];
        float grad[DOT_LANES];
        const F::Vector none = F::same(0.0f);
        copy_filled(k.z + j, rest, top, z);
        copy_filled(k.v + j, rest, none, v);
        if (GRAD) copy_filled(k.q + j, rest, none, q);
        if (HOT && GRAD) copy_filled(k.p + j, rest, none, p);
        if (DENSE) copy_filled(k.t + j, rest, none, t);
        block(z, v, q, p, t, grad);
        if (GRAD) std::memcpy(k.grad + j, grad, static_cast<std::size_t>(rest) * sizeof(float));
    }
    sums.mixed += mixed.sum();
    if (DENSE) sums.labelled += labelled.sum();
}

template <bool HOT, bool DENSE>
void learn_if(const Learner& k, std::int64_t n, LearnSums& sums) {
    if (k.grad) return learn_strip<HOT, DENSE, true>(k, n, sums);
    learn_strip<HOT, DENSE, false>(k, n, sums);
}

void learn(const Learner& k, std::int64_t n, LearnSums& sums) {
    if (k.p) return k.t ? learn_if<true, true>(k, n, sums) : learn_if<true, false>(k, n, sums);
    k.t ? learn_if<false, true>(k, n, sums) : learn_if<false, false>(k, n, sums);
}

void floats_of(const std::uint16_t* bf16, std::int64_t n, float* x) {
    for (std::int64_t j = 0; j < n; ++j) {
        const std::uint32_t bits = std::uint32_t{bf16[j]} << 16;
        std::memcpy(x + j, &bits, sizeof bits);
    }
}

void bf16_of(const float* x, std::int64_t n, std::uint16_t* bf16) {
    for (std::int64_t j = 0; j < n; ++j) {
        std::uint32_t bits;
        std::memcpy(&bits, x + j, sizeof bits);
        bf16[j] = static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}
#undef DML_FAST_INLINE
