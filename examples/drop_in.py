"""Into an existing training script: the shape of torchvision's reference script, and what engm adds to it.

The two lines marked `# engm` are all, beside the import: one is new, one is changed. Backward pass, gradient scaler,
clipping, schedule and checkpoints stay as they were. The script must have one loss an example (`reduction="none"`).

python examples/drop_in.py --epochs 1
"""

import argparse
import time
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision import transforms

import engm  # engm


def train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args, scaler):
    model.train()
    start, seen, total, correct = time.perf_counter(), 0, 0.0, 0
    for i, (image, target) in enumerate(data_loader):
        image, target = image.to(device), target.to(device)
        with torch.autocast(device.type, enabled=args.amp):
            output = model(image)
            losses = criterion(output, target)
            loss = optimizer.reweight(losses, loss_scale=scaler.get_scale()).mean()  # engm; was: loss = losses.mean()

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if args.clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()

        seen += len(target)
        total += losses.sum().item()
        correct += (output.argmax(1) == target).sum().item()
        if i % args.print_freq == 0:
            speed = seen / (time.perf_counter() - start)
            figures = f"loss {total / seen:.4f}  acc@1 {correct / seen:.1%}  {speed:.0f}/s"
            print(f"epoch {epoch} [{i}/{len(data_loader)}]  {figures}")


@torch.inference_mode()
def evaluate(model, criterion, data_loader, device):
    model.eval()
    seen, total, correct = 0, 0.0, 0
    for image, target in data_loader:
        image, target = image.to(device), target.to(device)
        output = model(image)
        seen += len(target)
        total += criterion(output, target).sum().item()
        correct += (output.argmax(1) == target).sum().item()
    print(f"test: loss {total / seen:.4f}  acc@1 {correct / seen:.1%}")
    return correct / seen


def load_data(args):
    if args.data_path is None:  # noise with labels, to see that everything runs
        options = {"image_size": (3, 32, 32), "num_classes": 10, "transform": transforms.ToTensor()}
        return (torchvision.datasets.FakeData(size, random_offset=size, **options) for size in (128, 32))
    crop = transforms.Compose(
        [transforms.RandomResizedCrop(176), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    centre = transforms.Compose([transforms.Resize(232), transforms.CenterCrop(224), transforms.ToTensor()])
    folders = (
        torchvision.datasets.ImageFolder(args.data_path / part, t) for part, t in (("train", crop), ("val", centre))
    )
    return tuple(folders)


def main(args):
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    dataset, dataset_test = load_data(args)
    data_loader = torch.utils.data.DataLoader(
        dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers
    )
    data_loader_test = torch.utils.data.DataLoader(dataset_test, args.batch_size, num_workers=args.workers)

    model = torchvision.models.get_model(args.model, num_classes=args.classes).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing, reduction="none")
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    optimizer = engm.ENGM(model := engm.GradNormModule(model), optimizer, alpha=args.alpha)  # engm
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp)

    first = 0
    if args.resume is not None:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        first = checkpoint["epoch"] + 1

    for epoch in range(first, args.epochs):
        train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args, scaler)
        lr_scheduler.step()
        evaluate(model, criterion, data_loader_test, device)
        if args.output_dir is not None:
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "epoch": epoch,
            }
            torch.save(checkpoint, args.output_dir / "checkpoint.pth")
    return model


def get_args_parser():
    parser = argparse.ArgumentParser(description="Image classification")
    parser.add_argument("--data-path", type=Path, help="folder with train/ and val/; noise if left out")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--classes", default=10, type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", default=32, type=int)
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--workers", default=0, type=int)
    parser.add_argument("--lr", default=0.05, type=float)
    parser.add_argument("--momentum", default=0.9, type=float)
    parser.add_argument("--weight-decay", default=1e-4, type=float)
    parser.add_argument("--label-smoothing", default=0.1, type=float)
    parser.add_argument("--clip-grad-norm", type=float)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--alpha", default=100.0, type=float, help="the largest norm of an example's gradient")
    parser.add_argument("--print-freq", default=2, type=int)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--seed", default=0, type=int)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
