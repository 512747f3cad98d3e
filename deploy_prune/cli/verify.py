"""`deploy-prune verify`: is this bundle whole, and does it still compute what it did where it was made?"""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Check a bundle: hashes, graphs, outputs on stored inputs.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--runtime", "runtimes", multiple=True, help="Ask in this runtime of `bench`.  [default: onnxruntime, CPU]"
)
@click.option("--key", type=click.Path(path_type=Path), help="Public key (PEM) the bundle must be signed with.")
@click.option("--identity", help="Sigstore identity it must be signed by; needs --issuer.")
@click.option("--issuer", help="OIDC issuer of the identity.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    bundle: Path, runtimes: tuple[str, ...], key: Path | None, identity: str | None, issuer: str | None, as_json: bool
) -> None:
    """Check BUNDLE: that no file is missing, foreign or changed; that every graph is valid ONNX with the interface the
    manifest states; and that every model still gives its stored outputs. Needs onnxruntime, not torch.

    Hashes alone find damage, not forgery: a signature does.

    Exit code 0: all is well; 1: a model computes something else here; 3: no such bundle, or no onnxruntime;
    4: the bundle is damaged, or not signed as asked.
    """
    from deploy_prune.cli import console
    from deploy_prune.release.verify import verify

    if (identity is None) != (issuer is None):
        raise click.UsageError("--identity and --issuer go together.")
    if identity is not None and issuer is not None:
        from deploy_prune.release.signing import check_identity

        check_identity(bundle, identity=identity, issuer=issuer)
    report = verify(bundle, key=key, runtimes=runtimes, progress=console.progress())
    if as_json:
        console.emit_json(report.to_json())
        return
    console.table(
        ["member", "runtime", "samples", "error", "tolerance", "argmax equal"],
        [
            [
                check.name,
                check.runtime,
                check.samples,
                f"{check.error:.1e}",
                f"{check.tolerance:.0e}",
                f"{100 * check.agreement:.0f} %",
            ]
            for check in report.members
        ],
        title=f"{report.name}: {report.files} files, {report.bytes / 2**20:.1f} MiB, whole and as made",
    )
    signature = "good" if identity is not None else report.signature
    console.note(f"manifest sha256 {report.manifest_sha256}, signature {signature}")
