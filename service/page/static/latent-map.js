// A plane through the latent space: reference embeddings as dots, and posteriors as ellipses of one standard deviation.

import { svgElement } from "./dom.js";
import { joinNames } from "./text.js";

const SIZE = 340; // units of the SVG's viewBox
const MARGIN = 1.1; // half the side of the visible square, relative to the farthest coordinate that must be visible
const PRIOR_STDS = 1.4; // standard deviations of the prior that must be visible
const POINT_QUANTILE = 0.99; // share of the points that must be visible
const MAX_LABELS = 24; // more labels would hide each other

/**
 * The map of a bundle, as in GET /page/samples/{model}.
 *
 * @typedef {object} MapData
 * @property {number[]} centre (latent)
 * @property {number[][]} plane (2, latent), two orthonormal axes
 * @property {number[][]} points (row, 2), reference embeddings in the plane
 * @property {string[] | null} labels (row)
 */

export class LatentMap {
  /**
   * @param {HTMLElement} container
   * @param {MapData} map
   */
  constructor(container, { centre, plane, points, labels }) {
    this.centre = centre;
    this.plane = plane;
    const prior = { mean: centre.map(() => 0), log_var: centre.map(() => 0) };
    const [priorX, priorY] = this.project(prior.mean);
    const extents = points.map((point) => Math.max(...point.map(Math.abs))).sort((a, b) => a - b);
    const farthest = Math.max(
      extents[Math.floor(POINT_QUANTILE * (extents.length - 1))] ?? 0,
      Math.abs(priorX) + PRIOR_STDS,
      Math.abs(priorY) + PRIOR_STDS,
    );
    this.scale = SIZE / 2 / (MARGIN * farthest);
    this.posteriors = svgElement("g");
    this.svg = svgElement(
      "svg",
      { viewBox: `${-SIZE / 2} ${-SIZE / 2} ${SIZE} ${SIZE}`, class: "latent-map", role: "img" },
      svgElement(
        "g",
        { class: "points" },
        ...points.map(([x, y]) => svgElement("circle", { cx: x * this.scale, cy: -y * this.scale, r: 1.6 })),
      ),
      this.ellipse(prior, "prior"),
      this.posteriors,
      svgElement("g", {}, ...this.labels(points, labels)),
    );
    container.replaceChildren(this.svg);
    this.show([], []);
  }

  /**
   * @param {string[][]} subsets the input modalities of each posterior; the first has all inputs
   * @param {import("./api.js").Posterior[]} posteriors in the same order
   * @param {number[][]} path (step, latent), the means of the first posterior during refinement
   */
  show(subsets, posteriors, path = []) {
    const ellipses = posteriors.map((posterior, i) => this.ellipse(posterior, i ? "unimodal" : "posterior")).reverse();
    const names = posteriors.slice(1).map((posterior, i) => {
      const { x, y, ry } = this.ellipseShape(posterior);
      return svgElement("text", { x, y: y - ry - 4, class: "posterior-name" }, subsets[i + 1].join(" + "));
    });
    const points = path.map((mean) => this.toSvg(mean).join(","));
    this.posteriors.replaceChildren(
      ...ellipses,
      ...names,
      points.length > 1 ? svgElement("polyline", { points: points.join(" "), class: "refinement-path" }) : "",
      posteriors.length ? this.dot(posteriors[0].mean) : "",
    );
    this.svg.setAttribute(
      "aria-label",
      posteriors.length
        ? `Map of the latent space with the posterior given ${joinNames(subsets[0])}`
        : "Map of the latent space with the prior",
    );
  }

  /** Returns the coordinates [x, y] in the plane of a point (latent). */
  project(mean) {
    return this.plane.map((axis) => axis.reduce((sum, a, i) => sum + a * (mean[i] - this.centre[i]), 0));
  }

  /** Returns the coordinates [x, y] in the SVG, where y points down, of a point (latent). */
  toSvg(mean) {
    const [x, y] = this.project(mean);
    return [x * this.scale, -y * this.scale];
  }

  dot(mean) {
    const [cx, cy] = this.toSvg(mean);
    return svgElement("circle", { cx, cy, r: 3.5, class: "mean" });
  }

  /** Projects a Gaussian: its covariance in the plane is plane · diag(variance) · planeᵀ. The angle is in degrees. */
  ellipseShape({ mean, log_var }) {
    const covariance = (a, b) => log_var.reduce((sum, l, i) => sum + this.plane[a][i] * this.plane[b][i] * Math.exp(l), 0);
    const [xx, xy, yy] = [covariance(0, 0), -covariance(0, 1), covariance(1, 1)]; // y points down
    const [middle, half] = [(xx + yy) / 2, Math.hypot((xx - yy) / 2, xy)]; // the eigenvalues are middle ± half
    const [x, y] = this.toSvg(mean);
    const angle = (90 / Math.PI) * Math.atan2(2 * xy, xx - yy);
    return { x, y, rx: this.scale * Math.sqrt(middle + half), ry: this.scale * Math.sqrt(Math.max(middle - half, 0)), angle };
  }

  ellipse(posterior, className) {
    const { x, y, rx, ry, angle } = this.ellipseShape(posterior);
    return svgElement("ellipse", { rx, ry, class: className, transform: `translate(${x} ${y}) rotate(${angle})` });
  }

  /** Returns one text for each label, at the mean of its points; none if there are too many labels. */
  labels(points, labels) {
    const groups = new Map();
    labels?.forEach((label, i) => label && groups.set(label, [...(groups.get(label) ?? []), points[i]]));
    if (groups.size > MAX_LABELS) return [];
    const mean = (group, axis) => group.reduce((sum, point) => sum + point[axis], 0) / group.length;
    return [...groups].map(([label, group]) =>
      svgElement("text", { x: mean(group, 0) * this.scale, y: -mean(group, 1) * this.scale }, label),
    );
  }
}
