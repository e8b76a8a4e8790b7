// The inner loops of labels that do not exclude each other (simd_body.hpp includes this after
// simd_loss.hpp): no include guard, no headers. The order of sums is as there.

#if defined(__GNUC__)
#define DML_FAST_INLINE __attribute__((always_inline))
#else
#define DML_FAST_INLINE
#endif

// x where z >= 0, else y; exact, as one of two terms is 0.
inline Floats::Vector by_sign(Floats::Vector z, Floats::Vector x, Floats::Vector y) {
    using F = Floats;
    const F::Vector zero = F::same(0.0f);
    return F::plus(F::zero_below(x, z, zero), F::minus(y, F::zero_below(y, z, zero)));
}

inline Floats::Vector size_of(Floats::Vector z) {
    return Floats::larger(z, Floats::minus(Floats::same(0.0f), z));
}

void toss(const float* z, std::int64_t n, float per_temperature, float* p, float* less,
          CoinSums& sums) {
    using F = Floats;
    using D = Doubles;
    const F::Vector factor = F::same(per_temperature), one = F::same(1.0f);
    LossLanes sizes, products;
    D::Vector factors[DOT_LANES / D::WIDTH];
    for (int i = 0; i < DOT_LANES / D::WIDTH; ++i) factors[i] = D::same(1.0);
    const auto block = [&](const float* from, float* yes, float* no) DML_FAST_INLINE {
        float e[DOT_LANES];
        for (int i = 0; i < LOSS_PARTS; ++i) {
            const int at = i * F::WIDTH;
            const F::Vector x = F::load(from + at), a = F::times(size_of(x), factor);
            const F::Vector w = Exponential(F::minus(F::same(0.0f), a)).whole;
            const F::Vector larger = F::over(one, F::plus(one, w));
            const F::Vector smaller = F::times(w, larger);
            F::store(e + at, w);
            F::store(yes + at, by_sign(x, larger, smaller));
            F::store(no + at, by_sign(x, smaller, larger));
            sizes.add(i, a);
            products.add(i, F::times(a, smaller));
        }
        for (int i = 0; i < DOT_LANES / D::WIDTH; ++i) {
            factors[i] = D::add_product<false>(factors[i], factors[i], D::widen(e + i * D::WIDTH));
        }
    };
    std::int64_t j = 0;
    for (; j + DOT_LANES <= n; j += DOT_LANES) block(z + j, p + j, less + j);
    const std::int64_t rest = n - j;
    double filled = 1.0;
    if (rest > 0) {  // filled up with 0: each multiplies by 2, exactly
        float from[DOT_LANES], yes[DOT_LANES], no[DOT_LANES];
        copy_filled(z + j, rest, F::same(0.0f), from);
        block(from, yes, no);
        std::memcpy(p + j, yes, static_cast<std::size_t>(rest) * sizeof(float));
        std::memcpy(less + j, no, static_cast<std::size_t>(rest) * sizeof(float));
        for (std::int64_t i = rest; i < DOT_LANES; ++i) filled *= 0.5;
    }
    double lanes[DOT_LANES];
    for (int i = 0; i < DOT_LANES / D::WIDTH; ++i) D::store(lanes + i * D::WIDTH, factors[i]);
    for (int half = DOT_LANES / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lanes[l] *= lanes[l + half];
    }
    sums.factor = lanes[0] * filled;
    sums.sizes = sizes.sum();
    sums.products = products.sum();
}

void learn_labels(const LabelLearner& k, std::int64_t n, LabelSums& sums) {
    using F = Floats;
    const F::Vector factor = F::same(k.per_temperature), one = F::same(1.0f);
    const F::Vector by_q = F::same(k.by_q), by_p = F::same(k.by_p), by_v = F::same(k.by_v);
    LossLanes mixed, away;
    const auto block = [&](const float* z, const float* v, const float* u, const float* q,
                           const float* p, const float* y, float* grad) DML_FAST_INLINE {
        for (int i = 0; i < LOSS_PARTS; ++i) {
            const int at = i * F::WIDTH;
            const F::Vector x = F::load(z + at), a = size_of(x);
            const F::Vector peers = F::load(v + at), target = F::load(y + at);
            mixed.add(i, F::times(F::times(a, factor), by_sign(x, F::load(u + at), peers)));
            away.add(i, F::times(a, by_sign(x, F::minus(one, target), target)));
            if (!grad) continue;
            F::Vector g = F::times(F::minus(F::load(q + at), target), by_q);
            g = F::plus(g, F::minus(F::times(F::load(p + at), by_p), F::times(peers, by_v)));
            F::store(grad + at, g);
        }
    };
    std::int64_t j = 0;
    for (; j + DOT_LANES <= n; j += DOT_LANES) {
        block(k.z + j, k.v + j, k.u + j, k.q + j, k.p + j, k.y + j, k.grad ? k.grad + j : nullptr);
    }
    const std::int64_t rest = n - j;
    if (rest > 0) {
        float z[DOT_LANES], v[DOT_LANES], u[DOT_LANES], q[DOT_LANES], p[DOT_LANES], y[DOT_LANES];
        float grad[DOT_LANES];
        const F::Vector none = F::same(0.0f);
        copy_filled(k.z + j, rest, none, z);
        copy_filled(k.v + j, rest, none, v);
        copy_filled(k.u + j, rest, none, u);
        copy_filled(k.q + j, rest, none, q);
        copy_filled(k.p + j, rest, none, p);
        copy_filled(k.y + j, rest, none, y);
        block(z, v, u, q, p, y, k.grad ? grad : nullptr);
        if (k.grad) {
            std::memcpy(k.grad + j, grad, static_cast<std::size_t>(rest) * sizeof(float));
        }
    }
    sums.mixed += mixed.sum();
    sums.away += away.sum();
}
#undef DML_FAST_INLINE
