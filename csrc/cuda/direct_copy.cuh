// Brings one operand of the direct form into shared memory: a window of its image's pixels, a row of channels each.
//
// operand [n, channels, z, y, x] with any strides. One step of the pipeline needs a rectangle of pixels, height × width
// of them, from a line and column on that move from step to step and may lie outside of the image, where all is zero.
// They end as rows[pixel][channel], kPitch elements each, so that any shift, stride or dilation leaves a row where
// ldmatrix can read it. The block's threads share the copies in one of three ways (Copies of direct_norm.h):
//
//   kRows      channels are neighbours in memory: 16 bytes of one pixel's channels go where they belong. A thread keeps
//              its channels and walks over pixels.
//   kLines     pixels are neighbours in memory: 16 bytes of one channel's pixels go to raw[channel][piece], whatever
//              their place in the window; transpose() then puts them into their rows, by ldmatrix where elements have
//              2 bytes. A thread keeps its piece and walks over channels.
//   kElements  nothing is aligned: single elements go where they belong. A thread keeps its pixel and walks over channels.
//
// Bytes: every pixel of the window once a channel, in kLines up to a piece more at both ends of a line. What a walk
// needs to know of a pixel or piece is in a table that aim() fills once a step: its address, with the sign set if all is
// zero. So a copy is a few instructions, whose addresses only advance.
#pragma once

#include "direct_norm.h"
#include "pack.cuh"

namespace engm::cuda {

// The first pixel of a window, in the image's coordinates.
struct Origin {
  int z, y, x;
};

template <class P, int kWidth, int kPitch, int kThreads>
struct Window {
  using E = typename P::Element;
  static constexpr int kVector = 16 / int(sizeof(E)), kChunks = kWidth / kVector, kWarps = kThreads / 32;
  // A warp of a transposition takes kLanes channels of kPieces pieces at once, and kGroups times that.
  static constexpr int kLanes = kWidth < 32 ? kWidth : 32, kPieces = 32 / kLanes, kGroups = kWidth / kLanes;
  static_assert(kWidth % kLanes == 0 && kWidth % 8 == 0 && kThreads % kChunks == 0 && kWarps % 2 == 0);

  const Operand& operand;
  const Staging& staging;
  const E* data;  // the first example's first channel of this block
  int channels;   // how many are valid from there on, may exceed kWidth
  int image_z, image_y, image_x;
  int height, width;
  int* place;     // [entries] line << 16 | column of a pixel or line << 16 | number of a piece; negative if it is none
  int64_t* from;  // [2][entries] bytes from data, negative if all is zero; of two steps in turn

  __device__ __forceinline__ bool lines() const { return staging.copies == Copies::kLines; }
  __device__ __forceinline__ int entries() const { return lines() ? height * staging.line_pieces : staging.rows; }

  // The column of a line's first piece: 16-byte aligned, at the window's first pixel or before it, inside the image.
  __device__ __forceinline__ int first_column(int x) const { return x <= 0 ? 0 : x / kVector * kVector; }

  // Fills in what the steps share: places, and zeros for channels that are none.
  __device__ __forceinline__ void begin(E* raw, int stages) const {
    const int a_line = lines() ? staging.line_pieces : width, all = height * a_line;
#pragma unroll 1
    for (int e = threadIdx.x; e < entries(); e += kThreads) place[e] = e < all ? e / a_line << 16 | e % a_line : -1;
    if (!lines()) return;
    const int pitch = staging.raw_pitch / int(sizeof(E));
    for (int stage = 0; stage < stages; ++stage, raw += kWidth * pitch)
#pragma unroll 1
      for (int e = channels * pitch + threadIdx.x; e < kWidth * pitch; e += kThreads) raw[e] = E{};
  }

  // Fills in the table of one step.
  __device__ __forceinline__ void aim(int slot, int64_t example, const Origin& o) const {
    if (int(threadIdx.x) >= entries()) return;
    const E* first_pixel = data + example * operand.example;
    int64_t* table = from + slot * staging.entries;
    const bool slice = unsigned(o.z) < unsigned(image_z);
    const int first = lines() ? first_column(o.x) : o.x, a_piece = lines() ? kVector : 1;
#pragma unroll 1
    for (int e = threadIdx.x; e < entries(); e += kThreads) {
      const int at = place[e], y = o.y + (at >> 16), x = first + (at & 0xffff) * a_piece;
      const bool inside = slice & (at >= 0) & (unsigned(y) < unsigned(image_y)) & (unsigned(x) < unsigned(image_x));
      const int64_t way = o.z * operand.space[0] + y * operand.space[1] + x * operand.space[2];
      table[e] = reinterpret_cast<int64_t>(first_pixel + (inside ? way : 0)) | (inside ? 0 : INT64_MIN);
    }
  }

  // Starts the copies of the step whose table is in `slot`, to its rows or, in kLines, to its raw pieces.
  __device__ __forceinline__ void load(E* to, int slot) const {
    const int64_t* table = from + slot * staging.entries;
    if (lines())
      copy_lines(to, table);
    else if (staging.copies == Copies::kRows)
      copy_rows(to, table);
    else
      copy_elements(to, table);
  }

  // Turns what has arrived into what products read: rounded to TF32 and, in kLines, moved from raw pieces to rows.
  // Columns outside of the image stay as they are while the window's columns do.
  __device__ __forceinline__ void prepare(E* rows, const E* raw, const Origin& o, bool new_columns) const {
    if (lines()) {
      if constexpr (sizeof(E) <= 4) {
        if (new_columns) clear_columns(rows, o.x);
        transpose(rows, raw, o.x);
      }
    } else if constexpr (P::kRoundOnArrival) {
      round(rows);
    }
  }

 private:
  // What a table's entry says: an address, which is valid in any case, and whether all is zero, if the sign is negative.
  static __device__ __forceinline__ const E* source_of(int64_t entry) {
    return reinterpret_cast<const E*>(entry & INT64_MAX);
  }
  static __device__ __forceinline__ int sign_of(int64_t entry) { return int(entry >> 32); }

  // Copies go in batches, with all addresses before them: in machine code every gap between them costs three
  // instructions that do nothing.
  __device__ __forceinline__ void copy_rows(E* to, const int64_t* table) const {
    const int c = threadIdx.x % kChunks * kVector, outside = c < channels ? 0 : -1, mine = outside ? 0 : c;
    int row = threadIdx.x / kChunks;
    to += row * kPitch + c, table += row;
    copy_rows_in_batches<4>(to, table, row, mine, outside);
    copy_rows_in_batches<2>(to, table, row, mine, outside);
    copy_rows_in_batches<1>(to, table, row, mine, outside);
  }

  template <int kBatch>
  __device__ __forceinline__ void copy_rows_in_batches(E*& to, const int64_t*& table, int& row, int c, int outside) const {
    constexpr int kStep = kThreads / kChunks;
#pragma unroll 1
    for (; row + (kBatch - 1) * kStep < staging.rows; row += kBatch * kStep) {
      int64_t entry[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j, table += kStep) entry[j] = *table;
#pragma unroll
      for (int j = 0; j < kBatch; ++j, to += kStep * kPitch)
        copy_async_or_zero<16>(to, source_of(entry[j]) + c, sign_of(entry[j]) | outside);
    }
  }

  __device__ __forceinline__ void copy_lines(E* raw, const int64_t* table) const {
    constexpr int kBatch = Staging::kBatch;
    const int lanes = staging.lanes, first = threadIdx.x >> staging.shift, lane = threadIdx.x & (lanes - 1);
    const int64_t *entry = table + lane, *const behind = table + entries();
    char* to = reinterpret_cast<char*>(raw) + first * staging.raw_pitch + lane * 16;
    const auto source_of_channel = [&](int64_t e) {
      return reinterpret_cast<const char*>(source_of(e)) + uint64_t(staging.channel) * unsigned(first);
    };
    if (channels >= staging.whole) {
#pragma unroll 1
      for (; entry < behind; entry += lanes, to += lanes * 16) {
        const int sign = sign_of(*entry);
        const char* source = source_of_channel(*entry);
        char* batch = to;
        int batches = staging.batches;
#pragma unroll 1
        do {
#pragma unroll
          for (int j = 0; j < kBatch; ++j)
            copy_async_or_zero<16>(j > 0 ? batch + staging.raw_far[j - 1] : batch,
                                   j > 0 ? source + staging.far[j - 1] : source, sign);
          source += staging.far[kBatch - 1], batch += staging.raw_far[kBatch - 1];
        } while (--batches > 0);
      }
      return;
    }
    const int end = channels < kWidth ? channels : kWidth;
#pragma unroll 1
    for (; entry < behind; entry += lanes, to += lanes * 16) {
      const char* source = source_of_channel(*entry);
      char* single = to;
#pragma unroll 1
      for (int c = first; c < end; c += staging.step, source += staging.far[0], single += staging.raw_far[0])
        copy_async_or_zero<16>(single, source, sign_of(*entry));
    }
  }

  // A warp takes 8 pixels and 4 channels: whole sectors in, where pixels are neighbours, and at most two-way conflicts
  // out.
  __device__ __forceinline__ void copy_elements(E* to, const int64_t* table) const {
    constexpr int kStep = kWarps / 2 * 4, kBatch = 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = lane / 8 + warp / 2 * 4;
    const int end = channels < kWidth ? channels : kWidth;
    const int64_t far = kStep * operand.channel;
#pragma unroll 1
    for (int row = lane % 8 + warp % 2 * 8; row < staging.rows; row += 16) {
      const int sign = sign_of(table[row]);
      const E* source = source_of(table[row]) + first * operand.channel;
      E* row_to = to + row * kPitch + first;
      if constexpr (sizeof(E) == 2) {
        copy_small_elements(row_to, source, first, sign < 0 ? 0 : end, kStep);
      } else {
#pragma unroll 1
        for (int c = first; c < kWidth; c += kBatch * kStep, source += kBatch * far, row_to += kBatch * kStep)
#pragma unroll
          for (int j = 0; j < kBatch; ++j)
            if (c + j * kStep < kWidth)
              copy_async_or_zero<int(sizeof(E))>(row_to + j * kStep, c + j * kStep < end ? source + j * far : data,
                                                 c + j * kStep < end ? sign : -1);
      }
    }
  }

  // Elements of 2 bytes, for which there is no asynchronous copy: loads in batches, so that some are under way, then
  // stores.
  __device__ __forceinline__ void copy_small_elements(E* to, const E* source, int first, int end, int step) const {
    constexpr int kBatch = 4;
#pragma unroll 1
    for (int c = first; c < kWidth; c += kBatch * step) {
      E batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j, source += step * operand.channel)
        batch[j] = c + j * step < end ? *source : E{};
#pragma unroll
      for (int j = 0; j < kBatch; ++j, to += step)
        if (c + j * step < kWidth) *to = batch[j];
    }
  }

  static __device__ __forceinline__ Pack<E, kVector> rounded(Pack<E, kVector> v) {
    if constexpr (P::kRoundOnArrival)
#pragma unroll
      for (int j = 0; j < kVector; ++j) v.at[j] = __uint_as_float(to_tf32(v.at[j]));
    return v;
  }

  __device__ __forceinline__ void round(E* rows) const {
    constexpr int kStep = kThreads / kChunks;
    rows += threadIdx.x / kChunks * kPitch + threadIdx.x % kChunks * kVector;
#pragma unroll 2
    for (int row = threadIdx.x / kChunks; row < staging.rows; row += kStep, rows += kStep * kPitch)
      store_pack(rows, rounded(load_pack<E, kVector>(rows)));
  }

  // Zeros for pixels of columns outside of the image, and for rows that are no pixels.
  __device__ __forceinline__ void clear_columns(E* rows, int x) const {
#pragma unroll 1
    for (int row = threadIdx.x; row < staging.rows; row += kThreads) {
      if (row < height * width && unsigned(x + row % width) < unsigned(image_x)) continue;
      for (int chunk = 0; chunk < kChunks; ++chunk)
        store_pack(rows + row * kPitch + chunk * kVector, Pack<E, kVector>{});
    }
  }

  // Where a piece lies in the window.
  struct Piece {
    int row;     // of its first pixel, may be before the line's first
    int column;  // the same, in the line
  };
  __device__ __forceinline__ Piece piece_at(int piece, int x) const {
    const int entry = place[piece], column = first_column(x) + (entry & 0xffff) * kVector - x;
    return {(entry >> 16) * width + column, column};
  }

  __device__ __forceinline__ void transpose(E* rows, const E* raw, int x) const {
    const int lane = threadIdx.x % 32, pieces = entries(), pitch = staging.raw_pitch / int(sizeof(E));
    const int inside = image_x - x < width ? image_x - x : width;  // columns of the window, of which some may be negative
    const unsigned columns = inside > 0 ? inside : 0;
#pragma unroll 1
    for (int first = threadIdx.x / 32 * kPieces; first < pieces; first += kWarps * kPieces) {
      if constexpr (sizeof(E) == 2) {
        // Matrix i holds 8 channels of one piece. Its columns are pixels, which a lane gets two channels of.
        constexpr int kBlocks = kLanes / 8;
        const int matrix = lane / 8, wanted = first + matrix / kBlocks;
        const E* source = raw + (matrix % kBlocks * 8 + lane % 8) * pitch + (wanted < pieces ? wanted : first) * kVector;
        uint32_t* to[kPieces];
        bool inside[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const Piece piece = piece_at(first + i < pieces ? first + i : first, x);
          to[i] = reinterpret_cast<uint32_t*>(rows + (piece.row + lane / 4) * kPitch + lane % 4 * 2);
          inside[i] = first + i < pieces && unsigned(piece.column + lane / 4) < columns;
        }
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          uint32_t two[4];
          load_matrix_x4_trans(two, source + g * kLanes * pitch);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (inside[i / kBlocks]) to[i / kBlocks][g * kLanes / 2 + i % kBlocks * 4] = two[i];
        }
      } else {
        const int number = first + lane / kLanes;
        if (number >= pieces) continue;
        const Piece piece = piece_at(number, x);
        const E* source = raw + lane % kLanes * pitch + number * kVector;
        E* to = rows + piece.row * kPitch + lane % kLanes;
        Pack<E, kVector> chunk[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) chunk[g] = rounded(load_pack<E, kVector>(source + g * kLanes * pitch));
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          if (unsigned(piece.column + j) < columns)
#pragma unroll
            for (int g = 0; g < kGroups; ++g) to[j * kPitch + g * kLanes] = chunk[g].at[j];
      }
    }
  }
};

}  // namespace engm::cuda
