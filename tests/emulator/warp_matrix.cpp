#include "warp_matrix.h"

#include <cstring>

#include "emulated_rounding.h"

namespace emulator {
namespace {

template <int kCount, bool kTransposed>
void load(Lanes& lanes) {
  for (int matrix = 0; matrix < kCount; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* address = static_cast<const LoadMatrixCall*>(lanes[8 * matrix + row])->row;
      check_shared(address, 16, 16, "a row of ldmatrix");
      std::memcpy(elements[row], address, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTransposed ? elements[2 * t][g] : elements[g][2 * t];
      const uint32_t high = kTransposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
      static_cast<const LoadMatrixCall*>(lanes[lane])->registers[matrix] = low | high << 16;
    }
  }
}

// The card reads the upper 19 bits of an operand.
struct Tf32 {
  static constexpr int kK = 8, kPerRegister = 1;
  static float value(uint32_t bits, int) { return __uint_as_float(bits & 0xffffe000u); }
};
struct Bf16 {
  static constexpr int kK = 16, kPerRegister = 2;
  static float value(uint32_t bits, int half) {
    return engm::cuda::to_float(engm::cuda::Bf16{uint16_t(bits >> 16 * half)});
  }
};
struct Fp16 {
  static constexpr int kK = 16, kPerRegister = 2;
  static float value(uint32_t bits, int half) {
    return engm::cuda::to_float(engm::cuda::Half{uint16_t(bits >> 16 * half)});
  }
};

template <typename Operand>
void multiply(Lanes& lanes) {
  typedef float Four __attribute__((vector_size(16)));
  constexpr int kK = Operand::kK, kPer = Operand::kPerRegister;
  float a[16][kK];
  alignas(16) float b[kK][8], c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const MmaCall& call = *static_cast<const MmaCall*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < kPer; ++half) {
      const int k = kPer * t + half;
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][k + kK / 2 * (r / 2)] = Operand::value(call.a[r], half);
      for (int r = 0; r < 2; ++r) b[k + kK / 2 * r][g] = Operand::value(call.b[r], half);
    }
    for (int e = 0; e < 4; ++e) c[g + 8 * (e / 2)][2 * t + e % 2] = call.c[e];
  }
  for (int m = 0; m < 16; ++m) {
    Four low = *reinterpret_cast<const Four*>(&c[m][0]), high = *reinterpret_cast<const Four*>(&c[m][4]);
    for (int k = 0; k < kK; ++k) {
      low += a[m][k] * *reinterpret_cast<const Four*>(&b[k][0]);
      high += a[m][k] * *reinterpret_cast<const Four*>(&b[k][4]);
    }
    std::memcpy(&c[m][0], &low, sizeof low), std::memcpy(&c[m][4], &high, sizeof high);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int e = 0; e < 4; ++e)
      static_cast<const MmaCall*>(lanes[lane])->c[e] = c[lane / 4 + 8 * (e / 2)][2 * (lane % 4) + e % 2];
}

}  // namespace

void load_two(Lanes& lanes) { load<2, false>(lanes); }
void load_two_transposed(Lanes& lanes) { load<2, true>(lanes); }
void load_four(Lanes& lanes) { load<4, false>(lanes); }
void load_four_transposed(Lanes& lanes) { load<4, true>(lanes); }

void multiply_tf32(Lanes& lanes) { multiply<Tf32>(lanes); }
void multiply_bf16(Lanes& lanes) { multiply<Bf16>(lanes); }
void multiply_fp16(Lanes& lanes) { multiply<Fp16>(lanes); }

void multiply_f64(Lanes& lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    double* c = static_cast<const MmaDoubleCall*>(lanes[lane])->c;
    for (int e = 0; e < 2; ++e)
      for (int k = 0; k < 4; ++k)
        c[e] += static_cast<const MmaDoubleCall*>(lanes[4 * (lane / 4) + k])->a *
                static_cast<const MmaDoubleCall*>(lanes[4 * (2 * (lane % 4) + e) + k])->b;
  }
}

}  // namespace emulator
