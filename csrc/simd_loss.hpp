// The inner loops of the mutual loss (simd_body.hpp includes this): no include guard, no headers.
//
// Element i of a row belongs to lane i mod DOT_LANES, as in a dot product, so that sums have the
// same order at every level. AVX2 and AVX-512 fuse products with sums, and have the same bits; the
// baseline has no such instruction, and rounds twice.

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
        constexpr int HALVES = Floats::WIDTH / D::WIDTH;
        D::Vector wide[DOT_LANES / D::WIDTH];
        for (int i = 0; i < LOSS_PARTS; ++i) {
            wide[i * HALVES] = Floats::template widen<0>(part[i]);
            if (HALVES > 1) wide[i * HALVES + HALVES - 1] = Floats::template widen<1>(part[i]);
        }
        for (int half = DOT_LANES / D::WIDTH / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) wide[i] = D::plus(wide[i], wide[i + half]);
        }
        return D::total(wide[0]);
    }
};

// exp(a) for a <= 0, and exp(a) - 1 without cancellation; 0 and -1 below the normal numbers.
// exp(a) = 2^n (1 + q) with n = round(a / ln 2), |r| <= ln(2) / 2 and q = exp(r) - 1 = r + r^2 p(r).
// Of all p of degree 4 this one has the smallest error: 3e-9, which rounding to 6e-8 hides.
struct Exponential {
    Floats::Vector a, scale, part, whole;
    explicit Exponential(Floats::Vector at) : a(at) {
        using F = Floats;
        const F::Vector magic = F::same(12582912.0f);  // 1.5 * 2^23: adding it rounds to integers
        const F::Vector shifted = F::fused(a, F::same(1.44269504088896341f), magic);
        const F::Vector n = F::minus(shifted, magic);
        F::Vector r = F::fused(n, F::same(-0.693359375f), a);
        r = F::fused(n, F::same(2.12194440e-4f), r);
        F::Vector p = F::same(1.3814540579915047e-3f);
        p = F::fused(p, r, F::same(8.36874544620514e-3f));
        p = F::fused(p, r, F::same(4.166838899254799e-2f));
        p = F::fused(p, r, F::same(0.1666652113199234f));
        p = F::fused(p, r, F::same(0.4999999403953552f));
        const F::Vector q = F::fused(p, F::times(r, r), r);
        scale = F::power_of_two(shifted);  // of no meaning below the normal numbers
        part = q;
        whole = normal(F::fused(scale, q, scale));
    }
    Floats::Vector less_one() const {
        using F = Floats;
        const F::Vector one = F::same(1.0f);
        const F::Vector less = F::fused(scale, part, F::minus(scale, one));
        return F::minus(normal(less), F::minus(one, normal(one)));
    }
    Floats::Vector normal(Floats::Vector x) const {
        return Floats::zero_below(x, a, Floats::same(-87.0f));
    }
};

// The rest of a row, filled up to a block.
inline void copy_filled(const float* from, std::int64_t n, Floats::Vector filling, float* block) {
    for (int i = 0; i < LOSS_PARTS; ++i) Floats::store(block + i * Floats::WIDTH, filling);
    std::memcpy(block, from, static_cast<std::size_t>(n) * sizeof(float));
}

Peak peak_of(const float* z, std::int64_t n) {
    using F = Floats;
    constexpr float NONE = -std::numeric_limits<float>::infinity();
    F::Vector best[LOSS_PARTS];
    LossLanes sum;
    for (int i = 0; i < LOSS_PARTS; ++i) best[i] = F::same(NONE);
    std::int64_t j = 0;
    for (; j + DOT_LANES <= n; j += DOT_LANES) {
        for (int i = 0; i < LOSS_PARTS; ++i) {
            const F::Vector x = F::load(z + j + i * F::WIDTH);
            best[i] = F::larger(best[i], x);
            sum.add(i, x);
        }
    }
    Peak peak{NONE, 0.0};
    float floats[DOT_LANES];
    for (int i = 1; i < LOSS_PARTS; ++i) best[0] = F::larger(best[0], best[i]);
    F::store(floats, best[0]);
    for (int half = F::WIDTH / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) {
            floats[l] = floats[l + half] > floats[l] ? floats[l + half] : floats[l];
        }
    }
    peak.largest = floats[0];
    peak.sum = sum.sum();
    for (; j < n; ++j) {
        peak.largest = z[j] > peak.largest ? z[j] : peak.largest;
        peak.sum += z[j];
    }
    return peak;
}

template <bool HOT, bool FLAT>
void soften_row(const float* z, std::int64_t n, float largest, float per_temperature,
                const Ahead& ahead, float* w, SoftSums& sums) {
    using F = Floats;
    const F::Vector top = F::same(largest), factor = F::same(per_temperature);
    sums = {0.0, 0.0, 0.0};
    for (std::int64_t begin = 0; begin < n; begin += LOSS_STRIP) {
        const std::int64_t end = begin + LOSS_STRIP < n ? begin + LOSS_STRIP : n;
        LossLanes whole, less_one, products;
        const auto add = [&](int i, F::Vector x, const F::Part* valid) DML_FAST_INLINE {
            F::Vector a = F::minus(x, top);
            if (HOT) a = F::times(a, factor);
            const Exponential e(a);
            const F::Vector e_whole = valid ? F::only(e.whole, *valid) : e.whole;
            whole.add(i, e_whole);
            if (FLAT) less_one.add(i, valid ? F::only(e.less_one(), *valid) : e.less_one());
            products.part[i] = F::fused(e_whole, a, products.part[i]);
            return e_whole;
        };
        std::int64_t j = begin;
        for (; j + DOT_LANES <= end; j += DOT_LANES) {
            ahead.fetch(j);
            for (int i = 0; i < LOSS_PARTS; ++i) {
                const std::int64_t at = j + i * F::WIDTH;
                F::store(w + at, add(i, F::load(z + at), nullptr));
            }
        }
        if (j < end) ahead.fetch(j);
        for (int i = 0; i < LOSS_PARTS; ++i) {
            const std::int64_t at = j + i * F::WIDTH;
            if (at >= end) break;
            const F::Part valid = F::part(end - at);
            F::store(w + at, add(i, F::load(z + at, valid), &valid), valid);
        }
        sums.whole += whole.sum();
        if (FLAT) sums.less_one += less_one.sum();
        sums.products += products.sum();
    }
}

void soften(const float* z, std::int64_t n, float largest, float per_temperature, bool flat,
            const Ahead& ahead, float* w, SoftSums& sums) {
    const auto row = per_temperature == 1.0f ? (flat ? &soften_row<false, true> : &soften_row<false, false>)
                                             : (flat ? &soften_row<true, true> : &soften_row<true, false>);
    row(z, n, largest, per_temperature, ahead, w, sums);
}

void mix_peers(const float* const* w, const float* factor, std::int64_t count, std::int64_t n,
               float* v) {
    using F = Floats;
    std::int64_t j = 0;
    for (; j + F::WIDTH <= n; j += F::WIDTH) {
        F::Vector sum = F::times(F::load(w[0] + j), F::same(factor[0]));
        for (std::int64_t l = 1; l < count; ++l) {
            sum = F::fused(F::load(w[l] + j), F::same(factor[l]), sum);
        }
        F::store(v + j, sum);
    }
    if (j < n) {
        const F::Part valid = F::part(n - j);
        F::Vector sum = F::times(F::load(w[0] + j, valid), F::same(factor[0]));
        for (std::int64_t l = 1; l < count; ++l) {
            sum = F::fused(F::load(w[l] + j, valid), F::same(factor[l]), sum);
        }
        F::store(v + j, sum, valid);
    }
}

enum class Writing { none, cached, streamed };

template <bool HOT, bool DENSE, Writing GRAD>
void learn_strip(const Learner& k, std::int64_t n, LearnSums& sums) {
    using F = Floats;
    const F::Vector top = F::same(k.largest), factor = F::same(k.per_temperature);
    const F::Vector by_q = F::same(k.by_q), by_p = F::same(k.by_p), by_v = F::same(-k.by_v);
    const F::Vector by_t = F::same(-k.by_t);
    LossLanes mixed, labelled;
    const auto part = [&](int i, std::int64_t at, const F::Part* valid) DML_FAST_INLINE {
        const auto load = [&](const float* from) DML_FAST_INLINE {
            return valid ? F::load(from + at, *valid) : F::load(from + at);
        };
        const F::Vector below = F::minus(load(k.z), top), peers = load(k.v);
        // The a of soften(), rounded alike: so most of its rounding error cancels in a divergence.
        const F::Vector a = HOT ? F::times(below, factor) : below;
        mixed.part[i] = F::fused(peers, a, mixed.part[i]);
        F::Vector target = top;
        if (DENSE) {
            target = load(k.t);
            labelled.part[i] = F::fused(target, below, labelled.part[i]);
        }
        if (GRAD == Writing::none) return;
        F::Vector g = F::fused(load(k.q), by_q, F::times(peers, by_v));
        if (HOT) g = F::fused(load(k.p), by_p, g);
        if (DENSE) g = F::fused(target, by_t, g);
        if (valid) {
            F::store(k.grad + at, g, *valid);
        } else if (GRAD == Writing::streamed) {
            F::stream(k.grad + at, g);
        } else {
            F::store(k.grad + at, g);
        }
    };
    std::int64_t j = 0;
    for (; j + DOT_LANES <= n; j += DOT_LANES) {
        for (int i = 0; i < LOSS_PARTS; ++i) part(i, j + i * F::WIDTH, nullptr);
    }
    for (int i = 0; i < LOSS_PARTS; ++i) {
        const std::int64_t at = j + i * F::WIDTH;
        if (at >= n) break;
        const F::Part valid = F::part(n - at);
        part(i, at, &valid);
    }
    sums.mixed += mixed.sum();
    if (DENSE) sums.labelled += labelled.sum();
}

template <bool HOT, bool DENSE>
void learn_if(const Learner& k, std::int64_t n, LearnSums& sums) {
    if (!k.grad) return learn_strip<HOT, DENSE, Writing::none>(k, n, sums);
    if (k.stream) return learn_strip<HOT, DENSE, Writing::streamed>(k, n, sums);
    learn_strip<HOT, DENSE, Writing::cached>(k, n, sums);
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
