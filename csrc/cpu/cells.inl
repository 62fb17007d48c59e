// What a step of a recurrent layer does element by element, for one example; outer_product.inl includes this file, and
// engm/rules/recurrence.py has the formulas. exp and tanh are Cephes', to one or two units in the last place: where the
// argument is small tanh is a polynomial, for 1 - 2 / (exp(2 x) + 1) would cancel.

// A vector's bits, and the constants of e^x = 2^k e^r with r in [-ln 2 / 2, ln 2 / 2]. `kMagic` rounds what is added.
template <typename T>
struct Powers;

template <>
struct Powers<float> {
  typedef int32_t Bits __attribute__((vector_size(ENGM_VECTOR_BYTES)));
  static constexpr float kMagic = 12582912.0f, kLargest = 88.0f, kLow = 0.693359375f, kRest = -2.12194440e-4f;
  static constexpr int32_t kMagicBits = 0x4B400000, kBias = 127, kMantissa = 23;

  // e^r
  template <typename V>
  static inline V small(V r) {
    V y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    return y * (r * r) + r + 1.0f;
  }

  // tanh(x) / x - 1 for z = x^2 up to 0.625^2
  template <typename V>
  static inline V tanh_small(V z) {
    V y = -5.70498872745e-3f * z + 2.06390887954e-2f;
    y = y * z - 5.37397155531e-2f;
    y = y * z + 1.33314422036e-1f;
    return (y * z - 3.33332819422e-1f) * z;
  }
};

template <>
struct Powers<double> {
  typedef int64_t Bits __attribute__((vector_size(ENGM_VECTOR_BYTES)));
  static constexpr double kMagic = 6755399441055744.0, kLargest = 708.0, kLow = 6.93145751953125e-1,
                          kRest = 1.42860682030941723212e-6;
  static constexpr int64_t kMagicBits = 0x4338000000000000, kBias = 1023, kMantissa = 52;

  template <typename V>
  static inline V small(V r) {
    const V z = r * r;
    const V p = r * ((1.26177193074810590878e-4 * z + 3.02994407707441961300e-2) * z + 9.99999999999999999910e-1);
    const V q = ((3.00198505138664455042e-6 * z + 2.52448340349684104192e-3) * z + 2.27265548208155028766e-1) * z + 2.0;
    return 1.0 + 2.0 * (p / (q - p));
  }

  template <typename V>
  static inline V tanh_small(V z) {
    const V p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
    const V q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
    return z * (p / q);
  }
};

// The same number in every lane.
template <typename T>
inline typename Vector<T>::Full all_lanes(T value) {
  return value + typename Vector<T>::Full{};
}

// e^x of x within ±kLargest, and of the nearest of them beyond; NaN stays.
template <typename T>
inline typename Vector<T>::Full exponential(typename Vector<T>::Full x) {
  using P = Powers<T>;
  using Full = typename Vector<T>::Full;
  const Full most = all_lanes<T>(P::kLargest);
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  const Full shifted = x * T(1.44269504088896340736) + P::kMagic, k = shifted - P::kMagic;
  const Full r = (x - k * P::kLow) - k * P::kRest;
  const typename P::Bits power = ((typename P::Bits)shifted - P::kMagicBits + P::kBias) << P::kMantissa;
  return P::small(r) * (Full)power;
}

template <typename T>
inline typename Vector<T>::Full sigmoid(typename Vector<T>::Full x) {
  return T(1) / (T(1) + exponential<T>(-x));
}

template <typename T>
inline typename Vector<T>::Full tanh(typename Vector<T>::Full x) {
  const typename Vector<T>::Full size = x < 0 ? -x : x, large = T(1) - T(2) / (exponential<T>(size + size) + T(1));
  const typename Vector<T>::Full small = x + x * Powers<T>::tanh_small(x * x), limit = all_lanes<T>(T(0.625));
  return size < limit ? small : x < 0 ? -large : large;
}

// Reads and writes whole vectors.
template <typename T>
struct Whole {
  typename Vector<T>::Full get(const T* p) const { return load(p); }
  void set(T* p, typename Vector<T>::Full value) const { put(p, value); }
};

// Reads and writes the first lanes of a vector; the others are read as 0.
template <typename T>
struct Begin {
  int64_t count;
  typename Vector<T>::Full get(const T* p) const {
    typename Vector<T>::Full value = {};
    for (int64_t l = 0; l < count; ++l) value[l] = p[l];
    return value;
  }
  void set(T* p, typename Vector<T>::Full value) const {
    for (int64_t l = 0; l < count; ++l) p[l] = value[l];
  }
};

// Calls `body(vector, u)` for one stretch of the elements [0, size) after the other, from u on; `vector` reads and writes.
template <typename T, typename Body>
inline void each_vector(int64_t size, const Body& body) {
  constexpr int64_t kLanes = Vector<T>::kLanes;
  int64_t u = 0;
  for (; u + kLanes <= size; u += kLanes) body(Whole<T>{}, u);
  if (u < size) body(Begin<T>{size - u}, u);
}

template <typename T>
void lstm(const CellStep<T>& s) {
  each_vector<T>(s.size, [&](const auto& v, int64_t u) {
    typename Vector<T>::Full gate[4];
    for (int g = 0; g < 4; ++g) {
      const int64_t at = g * s.size + u;
      const auto sum = v.get(s.gates + at) + v.get(s.product + at);
      gate[g] = g == 2 ? tanh<T>(sum) : sigmoid<T>(sum);
      v.set(s.gates + at, gate[g]);
    }
    const auto cell = gate[1] * v.get(s.before + u) + gate[0] * gate[2], squashed = tanh<T>(cell);
    v.set(s.inner + u, cell);
    v.set(s.squashed + u, squashed);
    v.set(s.hidden + u, gate[3] * squashed);
  });
}

template <typename T>
void back_lstm(const CellBack<T>& s) {
  each_vector<T>(s.size, [&](const auto& v, int64_t u) {
    const auto enter = v.get(s.gates + u), keep = v.get(s.gates + s.size + u), fresh = v.get(s.gates + 2 * s.size + u),
               out = v.get(s.gates + 3 * s.size + u), squashed = v.get(s.inner + u), hidden = v.get(s.hidden + u);
    const auto cell = v.get(s.state + u) + hidden * out * (T(1) - squashed * squashed);
    v.set(s.found + u, cell * fresh * enter * (T(1) - enter));
    v.set(s.found + s.size + u, cell * v.get(s.before + u) * keep * (T(1) - keep));
    v.set(s.found + 2 * s.size + u, cell * enter * (T(1) - fresh * fresh));
    v.set(s.found + 3 * s.size + u, hidden * squashed * out * (T(1) - out));
    v.set(s.state + u, cell * keep);
  });
}

template <typename T>
void gru(const CellStep<T>& s) {
  each_vector<T>(s.size, [&](const auto& v, int64_t u) {
    T *const resets = s.gates + u, *const updates = resets + s.size, *const fresh = updates + s.size;
    const auto part = [&](int64_t gate) { return v.get(s.product + gate * s.size + u) + v.get(s.bias + gate * s.size + u); };
    const auto reset = sigmoid<T>(v.get(resets) + part(0)), update = sigmoid<T>(v.get(updates) + part(1)), inner = part(2);
    const auto now = tanh<T>(v.get(fresh) + reset * inner);
    v.set(resets, reset);
    v.set(updates, update);
    v.set(fresh, now);
    v.set(s.inner + u, inner);
    v.set(s.hidden + u, now + update * (v.get(s.before + u) - now));
  });
}

template <typename T>
void back_gru(const CellBack<T>& s) {
  each_vector<T>(s.size, [&](const auto& v, int64_t u) {
    const auto reset = v.get(s.gates + u), update = v.get(s.gates + s.size + u), now = v.get(s.gates + 2 * s.size + u),
               hidden = v.get(s.hidden + u);
    const auto fresh = hidden * (T(1) - update) * (T(1) - now * now);
    const auto of_reset = fresh * v.get(s.inner + u) * reset * (T(1) - reset);
    const auto of_update = hidden * (v.get(s.before + u) - now) * update * (T(1) - update);
    for (T* found : {s.found, s.inputs}) {
      v.set(found + u, of_reset);
      v.set(found + s.size + u, of_update);
    }
    v.set(s.found + 2 * s.size + u, fresh * reset);
    v.set(s.inputs + 2 * s.size + u, fresh);
    v.set(s.state + u, hidden * update);
  });
}

template <typename T>
void rnn_tanh(const CellStep<T>& s) {
  each_vector<T>(s.size, [&](const auto& v, int64_t u) {
    v.set(s.hidden + u, tanh<T>(v.get(s.gates + u) + v.get(s.product + u)));
  });
}

template <typename T>
void back_rnn_tanh(const CellBack<T>& s) {
  each_vector<T>(s.size, [&](const auto& v, int64_t u) {
    const auto output = v.get(s.inner + u);
    v.set(s.found + u, v.get(s.hidden + u) * (T(1) - output * output));
  });
}

template <typename T>
void rnn_relu(const CellStep<T>& s) {
  each_vector<T>(s.size, [&](const auto& v, int64_t u) {
    const auto sum = v.get(s.gates + u) + v.get(s.product + u);
    v.set(s.hidden + u, sum < 0 ? decltype(sum){} : sum);
  });
}

template <typename T>
void back_rnn_relu(const CellBack<T>& s) {
  each_vector<T>(s.size, [&](const auto& v, int64_t u) {
    const auto hidden = v.get(s.hidden + u);
    v.set(s.found + u, v.get(s.inner + u) > 0 ? hidden : decltype(hidden){});
  });
}
